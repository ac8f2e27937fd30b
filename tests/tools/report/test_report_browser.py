"""The page in a real browser: quiet, offline, readable on a phone, on a desk and on paper."""

import pytest

from helpers.run_files import DGM, falling, write_arms, write_run
from lightning_estdgm.tools.report import compare, read_run, write

WIDTHS, SCHEMES = (400, 1400), ("light", "dark")
PAPER_PX = round((210 - 2 * 13) / 25.4 * 96)  # A4 within the margins of the page's own style

# Of all text that is shown: its size on the screen, and its contrast with what is behind it.
TEXTS = """() => {
  const parse = (colour) => {
    const [r, g, b, a = 1] = colour.match(/[\\d.]+/g).map(Number);
    return {rgb: [r, g, b], a};
  };
  const luminance = (rgb) => rgb
    .map((c) => c / 255).map((c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const {rgb, a} = parse(getComputedStyle(e).backgroundColor);
      if (a === 1) return rgb;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const e of document.body.querySelectorAll('*')) {
    const own = [...e.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data.trim()).join('');
    if (!own || e.closest('style')) continue;
    const style = getComputedStyle(e), inSvg = e.closest('svg') !== null;
    let size = parseFloat(style.fontSize);
    if (inSvg) { const m = e.getScreenCTM(); size *= Math.hypot(m.a, m.b); }
    const front = luminance(parse(inSvg ? style.fill : style.color).rgb);
    const back = luminance(behind(inSvg ? e.closest('svg').parentElement : e));
    const contrast = (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
    found.push({text: own.slice(0, 40), svg: inSvg, size, contrast});
  }
  return found;
}"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A plain report, and one that is hard to lay out: four arms, long names, large numbers, many warnings."""
    root = tmp_path_factory.mktemp("pages")
    write(compare([read_run(folder) for folder in write_arms(root / "plain")]), root / "plain.html")
    hard = []
    for i, arm in enumerate(("dense", "EST-DGM", "a_very_long_name_without_any_blank_" * 3, "one more arm")):
        for seed in range(3):
            folder = root / "hard" / f"{i}-{'folder_with_a_long_name_' * 4}{seed}"
            settings = {"watts": 4e5, "seconds": 3e5, "seed": seed, "method": DGM if i else None, "estimated": True}
            versions = {"torch": f"2.{i}.0+a_long_local_version_identifier"}
            run = {"batch_size": 16 * (i + 1), "versions": versions, "host": f"host-{i}.cluster.example.org"}
            hard.append(read_run(write_run(folder, falling(2.0 - i / 5), run=run, **settings), arm))
    write(compare(hard), root / "hard.html")
    return {name: root / f"{name}.html" for name in ("plain", "hard")}


@pytest.fixture(scope="module")
def visits(browser, pages):
    """Observations of each page at each width in each colour scheme."""
    seen = {}
    for name, file in pages.items():
        for width in WIDTHS:
            for scheme in SCHEMES:
                page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
                said, asked = [], []
                page.on("console", lambda message, said=said: said.append(message.text))
                page.on("pageerror", lambda error, said=said: said.append(str(error)))
                page.on("request", lambda request, asked=asked: asked.append(request.url))
                page.goto(file.as_uri())
                seen[name, width, scheme] = {
                    "said": said,
                    "asked": [url for url in asked if url != file.as_uri() and not url.startswith("data:")],
                    "page_px": page.evaluate("[document.documentElement.scrollWidth, innerWidth]"),
                    "texts": page.evaluate(TEXTS),
                    "tables": page.eval_on_selector_all(
                        ".scroll", "all => all.map(e => [e.scrollWidth, e.clientWidth, e.tabIndex])"
                    ),
                    "plots": page.eval_on_selector_all(
                        "figure svg", "all => all.map(e => [e.getBoundingClientRect().width, innerWidth])"
                    ),
                    "background": page.evaluate("getComputedStyle(document.body).backgroundColor"),
                    "title": page.title(),
                }
                page.close()
    return seen


def test_no_error_and_no_request(visits):
    for key, seen in visits.items():
        assert (seen["said"], seen["asked"]) == ([], []), key


def test_the_page_never_scrolls_sideways(visits):
    for key, seen in visits.items():
        scroll, inner = seen["page_px"]
        assert scroll <= inner, key


def test_wide_tables_scroll_inside_themselves_and_by_keyboard(visits):
    assert any(scroll > client for scroll, client, _ in visits["hard", 400, "light"]["tables"])
    for seen in visits.values():
        assert all(tab == 0 for _, _, tab in seen["tables"])


def test_the_answers_of_two_arms_fit_a_phone(visits):
    for scroll, client, _ in visits["plain", 400, "light"]["tables"][:2]:
        assert scroll <= client


def test_no_text_is_too_small_or_too_faint(visits):
    for key, seen in visits.items():
        assert len(seen["texts"]) > 150
        assert any(text["svg"] for text in seen["texts"])
        assert [text for text in seen["texts"] if text["size"] < 10.5] == [], key
        assert [text for text in seen["texts"] if text["contrast"] < 4.5] == [], key


def test_plots_use_the_width_there_is(visits):
    for (name, width, _), seen in visits.items():
        shares = [drawn / inner for drawn, inner in seen["plots"]]
        assert len(shares) == 3, name
        assert min(shares) > (0.8 if width == 400 else 0.2)


def test_dark_is_dark(visits):
    for name in ("plain", "hard"):
        assert visits[name, 400, "dark"]["background"] != visits[name, 400, "light"]["background"]


def test_the_title_is_the_finding(visits):
    assert visits["plain", 400, "light"]["title"].startswith(
        "EST-DGM reached val_loss ≤ 2 with 51.8 ± 0.2 % less energy"
    )


@pytest.mark.parametrize("name", ["plain", "hard"])
def test_on_paper_nothing_is_cut_off_and_it_is_light(browser, pages, name):
    page = browser.new_page(viewport={"width": PAPER_PX, "height": 1000}, color_scheme="dark")
    page.goto(pages[name].as_uri())
    printed = page.pdf(format="A4", print_background=True)
    assert printed.startswith(b"%PDF")
    assert len(printed) > 20_000
    page.emulate_media(media="print")
    assert page.evaluate("document.documentElement.scrollWidth") <= PAPER_PX
    wide = page.eval_on_selector_all(".scroll table", "all => all.map(e => e.getBoundingClientRect().right)")
    assert max(wide) <= PAPER_PX + 1
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(28, 39, 51)"
    page.close()
