"""Shows the formulas of notebooks as MathML, which browsers draw without any script."""

import html
import re

from latex2mathml.converter import convert

CODE = re.compile(r"(<pre.*?</pre>|<code.*?</code>|<style.*?</style>|<script.*?</script>)", re.DOTALL)
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$]+?)\$", re.DOTALL)


def on_page_content(content: str, *, page, **kwargs) -> str:
    """Replaces $...$ and $$...$$ in the text of a notebook, and leaves its code as it is."""
    if not page.file.src_uri.endswith(".ipynb"):
        return content
    parts = CODE.split(content)
    parts[::2] = [FORMULA.sub(_to_mathml, part) for part in parts[::2]]
    return "".join(parts)


def _to_mathml(formula: re.Match) -> str:
    display, inline = formula.groups()
    return convert(html.unescape(display or inline), display="block" if display else "inline")
