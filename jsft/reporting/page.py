"""The report as one self-contained HTML page: figures as SVG, tables, no scripts, no requests."""

import base64
import html
import io

from matplotlib.figure import Figure

from jsft.reporting.tables import Table

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 2rem auto;
  max-width: 1150px;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
h3 { font-size: 1rem; margin-bottom: .4rem; }
figure { margin: 1rem 0; } figure img { max-width: 100%; height: auto; }
figcaption, .note { color: #555; font-size: .88rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #e4e4e4; text-align: right; white-space: nowrap; }
th { vertical-align: bottom; white-space: normal; } th:first-child, td:first-child { text-align: left; }
.prose th, .prose td { white-space: normal; text-align: left; vertical-align: top; }
tbody tr:hover { background: #f5f7fa; }
"""


def svg(figure: Figure) -> bytes:
    """The figure as SVG, the same bytes for the same figure."""
    import matplotlib

    out = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "jsft", "svg.fonttype": "path"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def page(title: str, sections: list[tuple[str, list[Table | tuple[str, str, bytes]]]], notes: list[str]) -> str:
    """The page. A section is (heading, parts); a part is a table or (name, caption, SVG)."""
    parts = []
    for heading, content in sections:
        if not content:
            continue
        parts.append(f"<h2>{html.escape(heading)}</h2>")
        for item in content:
            if isinstance(item, Table):
                parts.append(item.html())
                continue
            name, caption, drawing = item
            data = base64.b64encode(drawing).decode()
            parts.append(
                f'<figure id="{name}"><img alt="{html.escape(caption)}" '
                f'src="data:image/svg+xml;base64,{data}">'
                f"<figcaption>{html.escape(caption)}</figcaption></figure>"
            )
    listed = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        # With this policy the browser fetches and runs nothing.
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>"
        f"{''.join(parts)}{f'<h2>Notes</h2><ul>{listed}</ul>' if listed else ''}</body></html>\n"
    )
