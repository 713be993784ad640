"""Our HTML pages: each is whole in itself and runs nothing.

They extend `page.html`, whose policy forbids scripts and addresses. Whatever a caption, a prompt or
a path says is text: everything that is shown is escaped, and secrets in URLs are left out.
"""

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from shared.io.names import without_secrets


def templates(folder: Path) -> Environment:
    """Those in `folder`, and those of all pages."""
    return Environment(
        loader=FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=True,
        trim_blocks=True,
        undefined=StrictUndefined,
        finalize=_shown,
    )


def _shown(value: Any) -> Any:
    return value if isinstance(value, Markup | int | float) else without_secrets(str(value))


def data_uri(kind: str, data: bytes) -> str:
    """A file inside of a page. `kind`: its media type."""
    return f"data:{kind};base64," + base64.b64encode(data).decode()
