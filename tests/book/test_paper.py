"""Pages without scripts: what is left out, and how a table is laid out."""

from __future__ import annotations

import pytest
from docutils import nodes
from docutils.utils import new_document

from darkmatter.book.paper import lay_out, leave_out


def test_links_buttons_filters_and_scripts_go_with_their_words() -> None:
    tree = new_document("")
    line = nodes.paragraph()
    line += nodes.Text("0.31 ")
    for tag, word in (('<a class="ledger-cell" href="#">', "cell"), ("<button>", "copy")):
        line += nodes.raw("", tag, format="html")
        line += nodes.Text(word)
        line += nodes.raw("", "</a>", format="html")
    line += nodes.raw("", "<b>", format="html")
    line += nodes.Text("kept")
    tree += line
    tree += nodes.raw("", "<fieldset>Show</fieldset>", format="html")
    tree += nodes.raw("", "\n<script>1</script>", format="html")
    leave_out(tree)
    left = [one.astext() for one in tree.findall(nodes.raw)]
    assert left == ["</a>", "</a>", "<b>"]
    assert "".join(one.astext() for one in line if isinstance(one, nodes.Text)) == "0.31 kept"


def test_columns_are_as_wide_as_their_words_and_sentences() -> None:
    tree = new_document("")
    table = nodes.table(classes=["colwidths-auto"])
    group = nodes.tgroup(cols=4)
    group += [nodes.colspec(colwidth=25) for _ in range(4)]
    body = nodes.tbody()
    long_name, sentence = "a-name-of-twenty-one", "word " * 100
    for cells in (("1", long_name, sentence, "x" * 50), ("2", "b", sentence, "y")):
        row = nodes.row()
        for text in cells:
            entry = nodes.entry()
            entry += nodes.paragraph("", text)
            row += entry
        body += row
    group += body
    table += group
    tree += table
    lay_out(tree)
    assert table["classes"] == ["longtable", "colwidths-given"]
    # A short word, the name, a sentence, and the most a name may ask for.
    wanted = [7, len(long_name), 60, 34]
    widths = [column["colwidth"] for column in tree.findall(nodes.colspec)]
    # Rounded to a whole number of tenths.
    assert widths == pytest.approx([10 * letters**0.5 for letters in wanted], abs=0.5)
