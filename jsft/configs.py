"""The config files that come with jsft, as a package: `from jsft.configs import recipes`.

In a checkout they lie in configs/ at its top, in an installed package in the folder beside this file.
"""

from jsft.environments import INSTALLED, PACKAGE, ROOT

FOLDER = PACKAGE / "configs" if INSTALLED else ROOT / "configs"
__path__ = [str(FOLDER)]
