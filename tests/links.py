"""Put the right line numbers into the README's links, [`name`](file.py#L12): python tests/links.py

A name that a file defines (class, def, or a constant at the left margin) is linked where that is, any other text where it
stands first."""
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def line_of(name, text):
    """The line, from 1, at which a file's text has the name. Raises ValueError if it has not."""
    lines = text.splitlines()
    for pattern in (rf" *(class|def) {re.escape(name)}\b", rf"{re.escape(name)} = ", rf".*\b{re.escape(name)}\b"):
        for number, line in enumerate(lines, 1):
            if re.match(pattern, line):
                return number
    raise ValueError(f"no {name}")


def with_lines(readme):
    """The README's text with each link at the line where its name is."""
    def link(match):
        name, file = match.group(1), match.group(2)
        return f"[`{name}`]({file}#L{line_of(name, (ROOT / file).read_text(encoding='utf-8'))})"
    return re.sub(r"\[`([^`]+)`\]\((\w+\.py)#L\d+\)", link, readme)


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(with_lines(path.read_text(encoding="utf-8")), encoding="utf-8")
