"""A world of things that people know, drawn by several hands, and edits with exact results."""
