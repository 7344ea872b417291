"""How every page that rankfold writes looks: one file, no script, nothing fetched, light or dark as the
reader has it, and as good on a phone, by keyboard and read aloud."""

from __future__ import annotations

import io
from importlib.metadata import version
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

LAYOUT = "rankfold.pages"


def render(package: str, template: str, versions_of: tuple[str, ...], **values: Any) -> str:
    """``template``, which lies in ``package`` and extends ``layout.html.j2``, with ``values``, which are all
    escaped but for Markup, and the versions of ``versions_of``."""
    loader = ChoiceLoader([PackageLoader(package, "."), PackageLoader(LAYOUT, ".")])
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["capitalize_first"] = lambda text: f"{text[:1].upper()}{text[1:]}"
    versions = {name: version(name) for name in versions_of}
    return environment.get_template(template).render(versions=versions, **values)


def picture(figure: Any, told: str) -> Markup:
    """A figure of matplotlib as SVG, with ``told`` for who cannot see it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    drawn = buffer.getvalue()
    shape = drawn[drawn.index("<svg") :].replace("<svg", '<svg aria-hidden="true"', 1)
    return Markup('<div class="picture" role="img" aria-label="{}">{}</div>').format(told, Markup(shape))
