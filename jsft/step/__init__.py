"""The programs of a training step, and what they are made from."""
