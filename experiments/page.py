"""Markdown as one HTML file that holds its images."""

import base64
import html
import re
from collections.abc import Mapping

from markdown_it import MarkdownIt


def of(text: str, images: Mapping[str, str]) -> str:
    """The page.

    Args:
        text: Markdown.
        images: SVG by the file names that it refers to.
    """
    body = MarkdownIt("commonmark").enable("table").render(text)
    for name, image in images.items():
        data = base64.b64encode(image.encode()).decode()
        body = body.replace(f'src="{name}"', f'src="data:image/svg+xml;base64,{data}"')
    title = html.escape(re.sub(r"^# ", "", text.splitlines()[0]))
    return _PAGE.format(title=title, body=body)


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 90rem; margin: auto; padding: 1rem; }}
table {{ border-collapse: collapse; font-size: 0.85rem; display: block; overflow-x: auto; }}
th, td {{ border-bottom: 1px solid #bbb; padding: 0.3rem 0.6rem; white-space: nowrap; }}
tr:first-child td {{ background: #eee; }}
img {{ max-width: 100%; }}
pre {{ background: #eee; padding: 0.7rem; white-space: pre-wrap; }}
</style>
{body}</html>
"""
