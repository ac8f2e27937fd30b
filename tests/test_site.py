"""The site: built without warnings, and read in a real browser on a phone and on a desk."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from playwright.sync_api import Browser, Page

from helpers.public_names import NAMES

ROOT = Path(__file__).parents[1]
WIDTHS = (400, 1400)
SHOWN = (
    "index.html",
    "getting-started.html",
    "guides/index.html",
    "guides/energy.html",
    "guides/scaling.html",
    "guides/compatibility.html",
    "methods/est-dgm.html",
    "results/study.html",
    "benchmarks/amd-epyc/README.html",
    "internals/README.html",
    "api/README.html",
    "api/lightning_estdgm.DGMConfig.html",
    "api/lightning_estdgm.EnergyMonitor.html",
    "notebooks/first_steps.html",
)
"""Pages of each kind, and the widest ones."""


class Links(HTMLParser):
    """Addresses that a page refers to, and the anchors that it has."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.addresses: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value and name == "id":
                self.anchors.add(value)
            elif value and name in ("href", "src"):
                self.addresses.add(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    folder = tmp_path_factory.mktemp("site") / "html"
    command = [sys.executable, str(ROOT / "docs" / "_site" / "build.py"), str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=folder.parent, check=False)
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
    return folder


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """Address of a server of this machine for the site: search reads other pages, which browsers refuse for files."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


class Visit:
    """A page in the browser, and what it said and asked for."""

    def __init__(self, browser: Browser, address: str, width: int, scheme: str = "light") -> None:
        self.page: Page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page.set_default_timeout(120_000)  # a busy machine is no fault of the site
        self.address = address
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("requestfailed", lambda request: self.said.append(f"{request.url}: {request.failure}"))
        self.page.on("response", lambda response: self._answered(response.status, response.url))

    def _answered(self, status: int, url: str) -> None:
        if status >= 400:
            self.said.append(f"{url}: {status}")

    def open(self, path: str) -> None:
        self.page.goto(f"{self.address}/{path}", wait_until="networkidle")

    @property
    def elsewhere(self) -> list[str]:
        """Requests that went to another machine."""
        return [url for url in self.asked if not url.startswith((self.address, "data:"))]


@pytest.fixture
def visit(browser: Browser, address: str, request: pytest.FixtureRequest) -> Iterator[Visit]:
    width, scheme = getattr(request, "param", (1400, "light"))
    visit = Visit(browser, address, width, scheme)
    yield visit
    visit.page.close()


def test_the_links_of_the_built_pages_lead_somewhere(site: Path) -> None:
    pages = {path: Links(path) for path in site.rglob("*.html") if "_modules" not in path.parts}
    assert len(pages) > 100
    dead = []
    for page, found in pages.items():
        for address in found.addresses:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc or address == "#":
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            anchor = unquote(parts.fragment)
            if not target.is_file() or (anchor and target in pages and anchor not in pages[target].anchors):
                dead.append(f"{page.relative_to(site)}: {address}")
    assert dead == []


@pytest.mark.parametrize(("package", "name"), NAMES)
def test_each_public_name_has_a_page_with_its_docstring(site: Path, package: str, name: str) -> None:
    text = (site / "api" / f"{package}.{name}.html").read_text(encoding="utf-8")
    described = re.search(r'<dt class="sig[^"]*"(?: id="([^"]+)")?', text)
    assert described is not None
    assert described[1] in (None, f"{package}.{name}")
    assert re.search(r"<dd><p>\s*\S", text), "nothing is said of it"
    assert f'href="{package}.{name}.html"' in (site / "api" / "README.html").read_text(encoding="utf-8")


def test_there_is_no_page_of_a_name_that_is_not_public(site: Path) -> None:
    pages = {path.stem for path in (site / "api").glob("lightning_estdgm*.html")}
    assert pages == {f"{package}.{name}" for package, name in NAMES}


@pytest.mark.parametrize("visit", [(width, "light") for width in WIDTHS] + [(400, "dark")], indirect=True)
def test_pages_are_quiet_offline_and_fit_the_screen(visit: Visit) -> None:
    for path in SHOWN:
        visit.open(path)
        scroll, inner = visit.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert scroll <= inner, f"{path} is {scroll} px wide on a screen of {inner}"
        broken = visit.page.eval_on_selector_all(
            "article img", "all => all.filter(e => e.complete && !e.naturalWidth).map(e => e.src)"
        )
        assert broken == [], path
        assert visit.page.evaluate("parseFloat(getComputedStyle(document.querySelector('article p')).fontSize)") >= 14
    assert visit.said == []
    assert visit.elsewhere == []


def test_formulas_are_drawn_by_the_browser(visit: Visit) -> None:
    visit.open("methods/est-dgm.html")
    heights = visit.page.eval_on_selector_all("math", "all => all.map(e => e.getBoundingClientRect().height)")
    assert len(heights) > 10
    assert min(heights) > 5


def test_search_finds_a_public_name_and_a_word(visit: Visit) -> None:
    for words, expected in (("DGMConfig", "lightning_estdgm.DGMConfig"), ("SIGTERM", "checkpoints")):
        visit.open(f"search.html?q={words}")
        visit.page.wait_for_selector("ul.search li a")
        visit.page.wait_for_load_state("networkidle")
        links = visit.page.eval_on_selector_all("ul.search li a", "all => all.map(e => e.href)")
        assert any(expected in link for link in links), words
    assert visit.said == []
    assert visit.elsewhere == []


def test_the_front_page_has_three_doors(visit: Visit) -> None:
    visit.open("index.html")
    doors = visit.page.eval_on_selector_all(".sd-card a", "all => all.map(e => e.getAttribute('href'))")
    assert doors == ["getting-started.html", "guides/energy.html", "guides/report.html"]


def test_other_projects_that_do_not_answer_are_left_out(site: Path, address: str, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("inventories", ROOT / "docs" / "_site" / "inventories.py")
    assert spec is not None
    assert spec.loader is not None
    inventories = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(inventories)
    sites = {"here": address, "no-page": f"{address}/missing", "no-answer": "http://127.0.0.1:9"}
    expected = {"here": (address, (str(tmp_path / "here.inv"),))}
    assert inventories.reachable(sites, tmp_path) == expected
    assert (tmp_path / "here.inv").read_bytes() == (site / "objects.inv").read_bytes()
    assert inventories.reachable({"here": "http://127.0.0.1:9"}, tmp_path)["here"][1] == expected["here"][1]
