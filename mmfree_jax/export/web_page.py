"""The web page of an export: static files beside the model, and its tokenizer."""

import json
import os
from pathlib import Path

from mmfree_jax.data.tokenizer import Tokenizer
from mmfree_jax.export.web_tokenizer import browser_tokenizer
from mmfree_jax.files import write_bytes

FILES = (
    "build.mjs",
    "files.js",
    "from-file.js",
    "index.html",
    "isolate.js",
    "kept.js",
    "package-lock.json",
    "package.json",
    "page.js",
    "sampling.js",
    "settings.js",
    "style.css",
    "tokenizer.js",
    "worker.js",
)
"""What is copied; `npm ci && npm run build` adds onnxruntime-web and the tokenizers' library."""


def write_page(folder: str | os.PathLike[str], tokenizer: Tokenizer) -> int:
    """Writes the page into `folder`/web; it loads `folder`/export.json and what that lists.

    Args:
      folder: of an export.
      tokenizer: of the model.

    Returns:
      Bytes written.

    Raises:
      DataError: the page has no means for this tokenizer.
    """
    source = Path(__file__).parent / "web"
    contents = {name: (source / name).read_bytes() for name in FILES}
    # Before the first file: a tokenizer that is refused leaves no half of a page.
    spec = browser_tokenizer(tokenizer)
    text = json.dumps(spec, ensure_ascii=False, separators=(",", ":"))
    contents["tokenizer.json"] = text.encode("utf-8")
    target = Path(folder) / "web"
    for name, data in contents.items():
        write_bytes(target / name, data)
    return sum(map(len, contents.values()))
