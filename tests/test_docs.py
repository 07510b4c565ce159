"""Every Python example of the README and of docs/ runs as it is shown."""

import re
from pathlib import Path

import pytest
import torch
from metal.mutations import MUTATIONS
from metal.strict.snippets import SNIPPETS

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


def examples(page: Path) -> list[tuple[int, str]]:
    """Line number and text of each ```python block, but those after a line <!-- not run -->."""
    found = []
    lines = page.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        if line.strip() == "```python" and (number == 0 or lines[number - 1].strip() != "<!-- not run -->"):
            end = next(i for i in range(number + 1, len(lines)) if lines[i].strip() == "```")
            found.append((number + 1, "\n".join(lines[number + 1 : end]) + "\n"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page's examples run in order and may use what earlier ones made, as a reader would try them."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for line, text in examples(page):
        # Blank lines before the text, so that a traceback shows the page's own line numbers.
        exec(compile("\n" * line + text, str(page), "exec"), names)


def test_operators_page_names_every_operator() -> None:
    from torch_tqattn.ops import OPERATORS

    text = (ROOT / "docs" / "operators.md").read_text(encoding="utf-8")
    for name in (*OPERATORS, "launch_policy"):
        assert re.search(rf"(^### |^\| ){name}\(", text, flags=re.M), name


def test_operators_page_names_every_argument() -> None:
    from torch_tqattn.ops import OPERATORS

    text = (ROOT / "docs" / "operators.md").read_text(encoding="utf-8")
    for name in OPERATORS:
        for argument in getattr(torch.ops.tqattn, name).default._schema.arguments:
            assert re.search(rf"\b{argument.name}\b", text), f"{argument.name} of {name}"


@pytest.mark.parametrize(
    ("page", "words", "count"),
    [
        ("README.md", "puts ([0-9]+) faults into", len(MUTATIONS)),
        ("docs/metal.md", "lists ([0-9]+) faults", len(MUTATIONS)),
        ("README.md", "([0-9]+) wrong snippets refused", len(SNIPPETS)),
    ],
)
def test_counts_are_those_of_the_code(page: str, words: str, count: int) -> None:
    assert re.findall(words, (ROOT / page).read_text(encoding="utf-8")) == [str(count)]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target
