"""What follows the tutorials sees where a page and what happens part."""

import pytest
from tutorial_pages import FIRST, PACKED, SHORTER, TUNED, missing, run_steps, steps

PAGE = """Text.

```sh
exit 1
```

```bash
n=7
echo "read  $n files"
echo end
```

```text
read 249 files
...
end
```

```python
from pathlib import Path

Path("made").write_text("yes")
print(Path("made").read_text())
```

```console
$ ls --no-such-option
ls: unrecognized ... '--no-such-option'
...
```

```bash
cat made; echo " $n"
sleep 1000 &
```

```text
yes 7
```
"""


@pytest.fixture
def follow(tmp_path):
    def run(text, changed=None, **options):
        (tmp_path / "page.md").write_text(text)
        (tmp_path / "empty").mkdir()
        shown = steps(tmp_path / "page.md", changed or {}, **options)
        return run_steps(tmp_path / "page.md", shown, tmp_path / "empty")

    return run


def test_blocks_share_a_shell_and_a_folder(follow):
    printed = follow(PAGE, {"n=7": "n=8"})
    assert printed[0] == ("read  8 files\nend\n", "")
    assert printed[1] == ("yes\n", "")
    assert printed[2].out == ""
    assert printed[2].err.startswith("ls: unrecognized")
    assert printed[3] == ("yes 8\n", "")


@pytest.mark.parametrize(
    ("shown", "other", "message"),
    [
        ("echo end", "echo and", r"page.md:7 does not print 'end'"),
        ("echo end", "false", r"page.md:7 ended with 1:\nread  7"),
        ("yes 7\n", "no 7\n", r"page.md:32 does not print 'no 7'"),
        ("Path(\"made\").write", "nothing.write", r"page.md:19 ended with 1:[^§]*NameError"),
        ("ls --no-such-option\n", "ls made\n", r"page.md:26 ended with 3:\nmade\nnot refused"),
        ("$ ls", "$ exit 3; ls", r"page.md:26 ended with 3"),
    ],
)  # fmt: skip
def test_what_a_page_says_wrongly_is_told(follow, shown, other, message):
    assert shown in PAGE
    with pytest.raises(AssertionError, match=message):
        follow(PAGE.replace(shown, other))


def test_changes_and_omissions_must_be_of_the_page(follow, tmp_path):
    with pytest.raises(AssertionError, match="n=9"):
        follow(PAGE, {"n=9": "n=8"})
    with pytest.raises(AssertionError, match="torch"):
        steps(tmp_path / "page.md", {}, without="torch")
    left = steps(tmp_path / "page.md", {}, without="cat made")
    assert [block.language for block in left] == ["bash", "python", "console"]


@pytest.mark.parametrize(
    ("shown", "printed", "lost"),
    [
        ("step  10/800  loss ...", "step 10/24  loss 7.5  lr 1e-3", []),
        ("a 1.5e-03 b\nc", "a 2 b\nx\nc", []),
        ("c\na", "a\nc", ["a"]),
        ("│ train   │  239 │ 3,246 │", "┏━━┓\n│ train │ 29 │ 107,116 │", []),
        ("819.2k tokens in 800 steps", "24.6k tokens in 24 steps", []),
        ("249 documents", "249 files", ["249 documents"]),
    ],
)
def test_lines_are_compared_in_kind(shown, printed, lost):
    assert missing(shown, printed) == lost


def test_a_line_may_come_from_either_stream():
    assert missing("a\nwarned\nb", "a\nb", "of a library\nwarned") == []
    assert missing("a\nb\nwarned", "b\na", "warned") == ["b"]


@pytest.mark.parametrize("page", [FIRST, TUNED, PACKED], ids=lambda page: page.stem)
def test_what_the_tests_change_is_in_the_tutorials(page):
    assert len(steps(page, SHORTER[page])) > 5
