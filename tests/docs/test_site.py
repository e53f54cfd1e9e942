"""The documentation in a browser: every page opens, fits a phone, fetches nothing from elsewhere; what moves, works.

The site is built once (``tests/support/site_server.py``), strictly, and opened in headless Chromium.
"""

from __future__ import annotations

import inspect
import json
import pkgutil
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import NormalDist
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import numpy as np
import pytest
import torch
from bs4 import BeautifulSoup
from patience import BUSY
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright
from public_names import names
from site_server import FLAGS, built_site, chromium, served

from refq4 import layout
from refq4.codebooks import Codebook, create_dynamic_map, get_codebook
from refq4.functional import dequantize_4bit, quantize_4bit
from refq4.internals.blockwise import decode_scales
from refq4.reference import ReferenceBackend

pytestmark = pytest.mark.reference_only("it is about the documentation")
MILLISECONDS = 1000 * BUSY
PARTS = 6
PHONE, SCREEN = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
WIDE = {"width": 1920, "height": 1080}
READABLE = (Path(__file__).parents[1] / "support" / "readable.js").read_text()
AT_ONCE = """addEventListener("DOMContentLoaded", () =>
  document.head.insertAdjacentHTML("beforeend", "<style>* { transition: none !important }</style>"))"""


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    base = tmp_path_factory.getbasetemp()
    return built_site(base if worker_id == "master" else base.parent)


@pytest.fixture(scope="session")
def address(site: Path) -> Iterator[str]:
    with served(site) as address:
        yield address


@pytest.fixture(scope="module")
def browser(request: pytest.FixtureRequest) -> Iterator[Browser]:
    found = chromium()
    if found is None:
        stop = pytest.fail if request.config.getoption("--require-peers") else pytest.skip
        stop("no Chromium to open the documentation in: apt-get install -y chromium, or put one on the PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=FLAGS, timeout=MILLISECONDS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = new_context(browser)
    yield context.new_page()
    context.close()


def new_context(browser: Browser, **settings: object) -> BrowserContext:
    """A window of its own, on a machine that may be busy."""
    context = browser.new_context(viewport=SCREEN, **settings)
    context.set_default_timeout(MILLISECONDS)
    return context


def pages_of(site: Path) -> dict[str, Path]:
    files = {path.relative_to(site).as_posix().removesuffix("index.html"): path for path in site.rglob("*.html")}
    return dict(sorted(files.items()))


@pytest.fixture(scope="module")
def parsed(site: Path) -> dict[str, BeautifulSoup]:
    return {name: BeautifulSoup(path.read_text(), "html.parser") for name, path in pages_of(site).items()}


# --- all pages --------------------------------------------------------------------------------------------------------


def test_every_link_and_anchor_leads_somewhere(site, parsed):
    ids = {name: {tag["id"] for tag in soup.find_all(id=True)} for name, soup in parsed.items()}
    wrong = [f"{name}: {fault}" for name, soup in parsed.items() for fault in wrong_links(site, name, soup, ids)]
    assert not wrong, "\n".join(wrong)
    assert len(parsed) > 50


def test_a_notebook_shows_each_of_its_cells_once(parsed):
    notebooks = [soup for name, soup in parsed.items() if name.startswith("notebooks/") and soup.select("pre code")]
    assert len(notebooks) >= 13
    for soup in notebooks:
        shown = " ".join(soup.get_text(" ").split())
        for cell in soup.select(".jp-CodeCell pre code"):
            code = " ".join(cell.get_text(" ").split())
            assert len(code) < 40 or shown.count(code) == 1, code


def wrong_links(site: Path, name: str, soup: BeautifulSoup, ids: dict[str, set[str]]) -> Iterator[str]:
    for tag in soup.find_all(["a", "link", "img", "script"]):
        link = tag.get("href") or tag.get("src")
        if not link or link.startswith("data:") or (tag.name == "a" and urlsplit(link).scheme):
            continue
        url, anchor = urldefrag(urljoin(f"https://site/{name}", link))
        path = unquote(urlsplit(url).path).removeprefix("/")
        if urlsplit(url).netloc != "site":
            yield f"fetches {link}"
        elif not (site / path).exists():
            yield f"leads to {link}, which is nowhere"
        elif anchor and path in ids and anchor not in ids[path]:
            yield f"leads to {link}, a page without that anchor"
    for tag in soup.select("svg [marker-end], svg use"):
        part = re.search(r"#[^)]+", tag.get("marker-end") or tag.get("href", ""))
        if part and part[0][1:] not in ids[name]:
            yield f"draws with {part[0]}, which is nowhere"


def test_pages_have_a_language_one_title_and_words_for_pictures_and_fields(parsed):
    wrong = []
    for name, soup in parsed.items():
        article = soup.find("article")
        if soup.html.get("lang") != "en" or len(article.find_all("h1")) != 1:
            wrong.append(f"{name}: no language, or not one h1")
        for picture in article.find_all("img"):
            words = picture.get("alt", "").strip()
            if not words or "No description" in words:
                wrong.append(f"{name}: a picture without words, {picture['src'][:60]}")
        for drawing in article.find_all("svg", role=["img", "group"]):
            if not (drawing.get("aria-label") or drawing.find("title")):
                wrong.append(f"{name}: a drawing without words")
        for field in article.find_all(["input", "select", "textarea"]):
            label = field.find_parent("label") or soup.find("label", attrs={"for": field.get("id")})
            if not (label or field.get("aria-label")):
                wrong.append(f"{name}: a field without a label, {field.get('id')}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("part", range(PARTS))  # so that two processes share the two minutes
def test_every_page_opens_without_errors_can_be_read_at_each_width_and_asks_no_other_host(part, site, address, page):
    problems: list[str] = []
    report = problems.append
    page.on("console", lambda m: m.type in ("error", "warning") and report(f"{page.url} logs {m.text}"))
    page.on("pageerror", lambda error: report(f"{page.url} raises {error}"))
    # A page may be left while its icon is on the way; that each link leads to a file is asked above.
    left = "net::ERR_ABORTED"
    page.on("requestfailed", lambda asked: asked.failure == left or report(f"{page.url} can't fetch {asked.url}"))
    page.on("response", lambda got: got.status >= 400 and report(f"{page.url}: {got.status} for {got.url}"))
    # Each page would read the index of all for its search field: a third of the time. The test below reads it once.
    index = json.loads((site / "search" / "search_index.json").read_text()) | {"docs": []}
    page.route("**/search/search_index.json", lambda route: route.fulfill(json=index))
    own = (address, "data:", "blob:")
    page.on("request", lambda asked: asked.url.startswith(own) or report(f"{page.url} asks {asked.url}"))
    page.add_init_script(AT_ONCE)
    for name in list(pages_of(site))[part::PARTS]:
        page.set_viewport_size(SCREEN)
        page.goto(address + name)
        schemes = ["light", "dark"]
        for size in (SCREEN, WIDE, PHONE):
            page.set_viewport_size(size)
            for scheme in schemes:
                for fault in page.evaluate(READABLE, {"phone": size is PHONE, "scheme": scheme}):
                    report(f"/{name} at {size['width']} px, {scheme}: {fault}")
            schemes.reverse()  # the next width begins with the scheme that is there: to change it takes its time
    assert not problems, "\n".join(problems)


def test_search_finds_a_word_without_a_server_s_help(address, page):
    page.goto(address)
    # Typed, since the page listens to keys: fill() gives it the focus and, on a busy machine, the word too late.
    page.locator(".md-search__input").press_sequentially("straddle")
    page.locator(".md-search-result__item").first.wait_for()
    assert page.locator(".md-search-result__item a").first.get_attribute("href").startswith(address)


# --- the reference ----------------------------------------------------------------------------------------------------


def test_every_public_name_has_a_heading_on_its_page_or_a_link_from_there_to_one(parsed):
    wrong, addresses = [], {}
    for page, module, name in names():
        path = f"reference/api/{page}/"
        if path not in addresses:
            addresses[path] = headings_and_links(path, parsed[path])
        if not any(leads_to(address, getattr(module, name), name) for address in addresses[path]):
            wrong.append(f"{path} neither shows {module.__name__}.{name} nor leads to it")
    assert not wrong, "\n".join(wrong)


def test_a_reference_page_shows_each_name_once_and_each_argument_with_its_type(parsed):
    wrong = []
    for path, soup in parsed.items():
        names_shown = [
            (name.get_text(), name.find_parent(class_="doc-object")) for name in soup.select(".doc-object-name")
        ]
        shown = [name for name, thing in names_shown if not thing.find_parent(class_="doc-class")]
        wrong += [f"{path} shows {name} twice" for name in sorted(set(shown)) if shown.count(name) > 1]
        for row in soup.select("table:has(th:first-child:-soup-contains('Name')) .doc-section-item"):
            name, kind = row.find_all("td")[:2]
            if "," in name.get_text() or not kind.get_text(strip=True):
                wrong.append(f"{path} has the row {row.get_text(' ', strip=True)}")
    assert not wrong, "\n".join(wrong)


def headings_and_links(path: str, soup: BeautifulSoup) -> set[str]:
    article = soup.find("article")
    headings = {urljoin(path, "#" + tag["id"]) for tag in article.find_all(["h2", "h3"], id=True)}
    links = [tag for tag in article.find_all("a", href=True) if "headerlink" not in tag.get("class", ())]
    return headings | {urljoin(path, tag["href"]) for tag in links}


def leads_to(address: str, thing: object, name: str) -> bool:
    """Whether the address of a heading, or of a module's page, is that of ``thing``, wherever it is defined."""
    page, anchor = urldefrag(address)
    if inspect.ismodule(thing):
        return page == f"reference/api/{name}/"
    return anchor.startswith("refq4.") and anchor.endswith(f".{name}") and pkgutil.resolve_name(anchor) is thing


# --- the picture ------------------------------------------------------------------------------------------------------


def shown(page: Page) -> str:
    panels = page.locator(".panels .panel:visible")
    assert panels.count() == 1
    return panels.get_attribute("id") or ""


@pytest.mark.parametrize(("drawing", "size"), [("wide", SCREEN), ("tall", PHONE)], ids=["screen", "phone"])
def test_a_click_on_a_step_shows_its_rule_code_and_ways_on(address, page, drawing, size):
    page.set_viewport_size(size)
    page.goto(address)
    assert page.locator(".pipeline svg:visible").count() == 1
    for number in (3, 7, 1, 2, 4, 5, 6):
        link = page.locator(f".pipeline svg.{drawing} a[href='#step-{number}']")
        link.click()
        assert shown(page) == f"step-{number}"
        assert link.get_attribute("aria-current") == "step"
        assert page.locator(f".{drawing} a[aria-current]").count() == 1
        panel = page.locator(f"#step-{number}")
        assert "def " in panel.locator("pre").first.inner_text()
        assert panel.locator("tbody tr").count() >= 2
        assert panel.locator(f"a[href^='explanation/step-{number}-']").count() == 1
        assert panel.bounding_box()["y"] < size["height"], "the panel is out of sight"


def test_steps_are_chosen_with_the_keyboard(address, page):
    page.goto(address)
    first = page.locator(".pipeline svg.wide a").first
    while not first.evaluate("link => link === document.activeElement"):
        page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert shown(page) == "step-1", "moving the focus chooses nothing"
    page.keyboard.press("Enter")
    assert shown(page) == "step-3"
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Space")
    assert shown(page) == "step-2"
    focused = page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert focused == "Step 2: ask for the backend's layout"


def test_without_a_script_all_steps_are_there(browser, address):
    context = new_context(browser, java_script_enabled=False)
    page = context.new_page()
    page.goto(address)
    assert page.locator(".panels .panel:visible").count() == 7
    context.close()


# --- the figures in the notebooks -------------------------------------------------------------------------------------

NORMAL = torch.tensor([NormalDist().inv_cdf((i + 0.5) / 64) for i in range(64)])


def decoded(weights: torch.Tensor, thresholds: Iterable[float] | None, blocksize: int) -> torch.Tensor:
    """NF4 and back by the reference, with the thresholds given."""
    nf4, reference = get_codebook("nf4"), ReferenceBackend()
    code = Codebook("moved", nf4.values, thresholds or nf4.thresholds).on("cpu")
    packed, absmax = reference.quantize_4bit(weights, code, blocksize)
    codes = layout.unpack(packed, len(weights))
    return reference.dequantize_blockwise(codes, absmax, code.values, blocksize, torch.float32)


def error(weights: torch.Tensor, back: torch.Tensor) -> str:
    return f"{float((back - weights).norm() / weights.norm()):.4f}"


def test_a_threshold_is_dragged_and_moved_by_keys_and_the_error_is_the_reference_s(address, page):
    page.goto(address + "notebooks/02_sixteen_numbers/")
    told, moved = page.locator("#figure-thresholds p"), list(get_codebook("nf4").thresholds)
    best = error(NORMAL, decoded(NORMAL, moved, 64))
    grip = page.get_by_role("slider", name="threshold 10", exact=True)
    grip.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    moved[10] = float(grip.get_attribute("aria-valuenow"))
    assert moved[10] == pytest.approx(get_codebook("nf4").thresholds[10] + 0.03, abs=1e-4)
    assert told.inner_text() == f"error |W - W4| / |W| = {error(NORMAL, decoded(NORMAL, moved, 64))}; " + (
        f"with the midpoints {best}"
    )
    last = page.get_by_role("slider", name="threshold 14", exact=True)
    box = last.locator("circle").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] - 900, box["y"], steps=3)  # further than it goes: to the value below
    page.mouse.up()
    moved[14] = float(last.get_attribute("aria-valuenow"))
    assert moved[14] == pytest.approx(get_codebook("nf4").values[14], abs=1e-4)
    got = error(NORMAL, decoded(NORMAL, moved, 64))
    assert float(got) > float(best)
    assert got in told.inner_text()
    page.get_by_role("button", name="back to the midpoints").click()
    assert told.inner_text().startswith(f"error |W - W4| / |W| = {best};")


@pytest.mark.parametrize("presses", [0, 30, 190], ids=["like the others", "larger", "an outlier"])
def test_an_outlier_spoils_its_own_block_as_the_reference_says(address, page, presses):
    page.goto(address + "notebooks/03_blocks_and_scales/")
    slider = page.locator("#outlier-weight")
    slider.focus()
    for _ in range(presses):
        page.keyboard.press("ArrowRight")
    weights = NORMAL[[2 * (13 * i % 32) for i in range(32)]].clone()
    weights[5] = 1 + presses / 10
    back = decoded(weights, None, 16)
    parts = []
    for block in ([i for i in range(16) if i != 5], range(16, 31)):
        mine = list(block)
        parts.append(f"{int((back[mine] == 0).sum())} of 15 became 0, their error {error(weights[mine], back[mine])}")
    wanted = f"Beside it: {parts[0]}. In the next block: {parts[1]}."
    assert page.locator("#figure-outlier p").inner_text() == wanted


def test_every_byte_of_the_dynamic_map_shows_its_value(address, page):
    page.goto(address + "notebooks/04_quantising_the_scales/")
    # Gray's order: from one byte to the next, one bit is pressed.
    shown = page.evaluate("""() => {
      const bits = [...document.querySelectorAll("#figure-byte .bit")].reverse(), shown = {};
      for (const bit of bits) if (bit.getAttribute("aria-pressed") === "true") bit.click();
      for (let i = 0; i < 256; i++) {
        if (i) bits[Math.log2(i & -i)].click();
        shown[i ^ (i >> 1)] = document.querySelector("#figure-byte p").textContent;
      }
      return shown;
    }""")
    dynamic, used = create_dynamic_map(), set()
    assert (shown.pop("0"), shown.pop("128")) == ("no one at all: 0", "no one at all: 1, the largest")
    for byte, told in shown.items():
        value, place = re.search(r"The value is (\S+), number (\d+) of", told).groups()
        sign, rest = divmod(int(byte), 128)
        zeros, steps = 7 - rest.bit_length(), 1 << (rest.bit_length() - 1)
        exact = 10.0**-zeros * (0.1 + 0.9 * (rest - steps + 0.5) / steps)
        assert float(value) == pytest.approx(-exact if sign else exact, rel=1e-6), byte
        assert float(value) == pytest.approx(float(dynamic[int(place)]), rel=1e-6), byte
        used.add(int(place))
    assert used == set(range(256)) - {127, 255}


# --- the playground ---------------------------------------------------------------------------------------------------


def four_blocks(rng: random.Random) -> tuple[str, int, list[float]]:
    """A codebook, a blocksize and the weights of four blocks, the last one as a rule short: exact fp32 numbers."""
    book = rng.choice(["nf4", "fp4", "nf4", "fp4", "af4", "e2m1", "int4", "iq4nl"])
    blocksize = rng.choice([4, 4, 8, 8, 16, 32])
    weights = [x for _ in range(3) for x in random_block(rng, book, blocksize)]
    weights += random_block(rng, book, rng.randint(1, blocksize))
    return book, blocksize, np.array(weights, dtype=np.float32).tolist()


def random_block(rng: random.Random, book: str, count: int) -> list[float]:
    top = rng.choice([1.0, 0.37, 3.0, 1e-3])
    ties = [*(edge * top for edge in get_codebook(book).thresholds), top, -top]
    draw = {
        "normal": lambda: rng.gauss(0, 1),
        "ties": lambda: rng.choice(ties),
        "zeros": lambda: rng.choice([0.0, -0.0]),
        "tiny": lambda: rng.choice([1e-45, -1e-45, 1e-38, -3e-39, 2e-38, 0.0, -0.0]),
        "huge": lambda: rng.uniform(-3.4, 3.4) * 1e38,
        "outlier": lambda: rng.choice([rng.gauss(0, 1)] * 9 + [100.0]),
        "mixed": lambda: rng.choice([0.0, -0.0, 1e-40, rng.gauss(0, 1), rng.gauss(0, 1), 1e30]),
    }
    kind = rng.choice(list(draw))
    block = [draw[kind]() for _ in range(count)]
    if kind == "ties":
        block[0] = top  # so that the thresholds are met exactly
    return block


RESULTS = """() => ({
    ...Object.fromEntries(
        ["absmax", "codes", "packed", "problem"].map((id) => [id, document.getElementById(id).textContent]),
    ),
    decoded: [...document.querySelectorAll("#rows .decoded")].map((cell) => cell.title).join(" "),
})"""


def fp32_bits(text: str) -> list[int]:
    return np.array([float(word) for word in text.split()], dtype=np.float32).view(np.uint32).tolist()


def test_the_playground_computes_200_random_blocks_bit_for_bit(address, page):
    page.goto(address + "playground/")
    rng = random.Random(0)
    reference = ReferenceBackend()
    for _ in range(50):
        name, blocksize, weights = four_blocks(rng)
        page.locator("#book").select_option(name)
        page.locator("#blocksize").select_option(str(blocksize))
        page.locator("#weights").fill(" ".join(map(repr, weights)))
        got = page.evaluate(RESULTS)
        case = f"{name}, blocksize {blocksize}: {weights}"

        code = get_codebook(name).on("cpu")
        packed, absmax = reference.quantize_4bit(torch.tensor(weights), code, blocksize)
        codes = layout.unpack(packed, len(weights))
        values = reference.dequantize_blockwise(codes, absmax, code.values, blocksize, torch.float32)
        assert got["problem"] == "", case
        assert [int(c, 16) for c in got["codes"].split()] == codes.tolist(), case
        assert bytes.fromhex(got["packed"]) == bytes(packed.tolist()), case
        assert fp32_bits(got["absmax"]) == absmax.numpy().view(np.uint32).tolist(), case
        assert fp32_bits(got["decoded"]) == values.numpy().view(np.uint32).tolist(), case


def test_the_playground_compares_codes_greys_old_results_and_starts_with_what_a_link_asks_for(address, page):
    page.goto(address + "playground/#outlier")
    weights = [float(word) for word in page.locator("#weights").input_value().split()]
    assert weights[3] == 8.0
    W = torch.tensor(weights)
    told = dict(part.rsplit(" ", 1) for part in page.locator("#others").inner_text().split(", "))
    assert {"nf4", "fp4", "int4"} <= set(told)
    for name, figure in told.items():
        code = get_codebook(name).on("cpu")
        packed, absmax = ReferenceBackend().quantize_4bit(W, code, 8)
        codes = layout.unpack(packed, len(W))
        decoded = ReferenceBackend().dequantize_blockwise(codes, absmax, code.values, 8, torch.float32)
        assert float(figure) == pytest.approx(float((decoded - W).norm() / W.norm()), abs=1e-4), name
    page.locator("#weights").fill("abc")
    assert page.locator(".playground.stale").count() == 1
    page.locator("#weights").fill("1 2")
    assert page.locator(".playground.stale").count() == 0


SIDES = """() => ({
    ...Object.fromEntries(
        ["codes", "codes2", "level", "bytes", "scales"].map((id) => [id, document.getElementById(id).textContent]),
    ),
    ...Object.fromEntries(["decoded", "decoded2", "error", "error2"].map((name) => [
        name, [...document.querySelectorAll(`#rows .${name}`)].map((cell) => cell.title).join(" "),
    ])),
})"""


@pytest.mark.parametrize("further", [0, 400], ids=["its own blocks", "the first blocks of a layer"])
def test_two_codebooks_and_double_quantisation_side_by_side_are_refq4_s(address, page, further):
    page.goto(address + "playground/")
    page.get_by_label("double quantisation", exact=True).check()
    rng = random.Random(further)
    for books in (("nf4", "fp4"), ("af4", "e2m1"), ("fp4", "int4"), ("iq4nl", "nf4")):
        blocksize = rng.choice([32, 64, 128])
        W = torch.tensor([rng.gauss(0, rng.choice([0.1, 1, 20])) for _ in range(rng.randint(blocksize, 256))])
        if further:  # blocks of which the page knows no more than the mean and the largest distance
            W = torch.cat([W[: len(W) // blocksize * blocksize], torch.randn(further * blocksize)])
        else:  # scales of few bits: their mean is exact, in whatever order they are summed
            W[::blocksize] = torch.tensor([float(rng.randint(1, 9) << 6) for _ in W[::blocksize]])
        states = [quantize_4bit(W, quant_type=b, blocksize=blocksize, compress_statistics=True) for b in books]
        (_, state), shown = states[0], len(W) - further * blocksize
        level = [float(state.offset), float(state.state2.absmax[0])]
        for field, value in zip(("#mean", "#distance"), level, strict=True):
            page.locator(field).fill(repr(value) if further else "")
        for field, value in (("#book", books[0]), ("#second", books[1]), ("#blocksize", str(blocksize))):
            page.locator(field).select_option(value)
        page.locator("#weights").fill(" ".join(map(repr, W[:shown].tolist())))
        got = page.evaluate(SIDES)

        assert fp32_bits(got["level"]) == fp32_bits(" ".join(map(repr, level)))
        assert list(bytes.fromhex(got["bytes"])) == state.absmax.tolist()[: -(-shown // blocksize)]
        scales = decode_scales(state).tolist()[: -(-shown // blocksize)]
        assert fp32_bits(got["scales"]) == fp32_bits(" ".join(map(repr, scales)))
        for (packed, state), side in zip(states, ("", "2"), strict=True):
            codes = layout.unpack(packed.view(-1), len(W))[:shown].tolist()
            assert [int(code, 16) for code in got[f"codes{side}"].split()] == codes
            back = dequantize_4bit(packed, state)[:shown]
            assert fp32_bits(got[f"decoded{side}"]) == back.numpy().view(np.uint32).tolist()
            wrong = [float(word) for word in got[f"error{side}"].split()]
            assert wrong == pytest.approx((back.double() - W[:shown].double()).tolist(), rel=1e-6)


def test_the_playground_s_second_codebook_and_double_quantisation_are_switched_by_keys_and_can_be_read(address, page):
    page.add_init_script(AT_ONCE)
    page.goto(address + "playground/")
    before = page.evaluate(RESULTS)
    assert page.locator(".nested:visible, .second:visible").count() == 0
    page.get_by_label("double quantisation", exact=True).focus()
    page.keyboard.press("Space")
    page.get_by_label("beside it").focus()
    page.keyboard.press("f")
    assert page.locator("#second").input_value() == "fp4"
    assert page.locator(".nested:visible, .second:visible").count() == 14
    assert page.locator(".axis .beside").count() == 15, "FP4 has sixteen codes, two of them 0"
    for size, scheme in ((SCREEN, "light"), (SCREEN, "dark"), (PHONE, "dark"), (PHONE, "light")):
        page.set_viewport_size(size)
        assert page.evaluate(READABLE, {"phone": size is PHONE, "scheme": scheme}) == []
    page.locator("#mean").fill("-1")
    assert "from 0 to 3.4e38" in page.locator("#problem").inner_text()
    page.get_by_label("double quantisation", exact=True).uncheck()
    page.locator("#second").select_option("")
    assert page.evaluate(RESULTS) == before
    assert page.locator(".nested:visible, .second:visible").count() == 0


def test_a_weight_is_typed_and_dragged_in_the_playground(address, page):
    page.goto(address + "playground/")
    page.locator("#weights").fill("")
    page.locator("#weights").press_sequentially("1 -0.5, 0.25")
    assert page.locator("#codes").inner_text() == "f 2 a"
    assert page.locator("#packed").inner_text() == "f2 a7"
    slider = page.get_by_label("weight 1", exact=True)
    slider.focus()
    page.keyboard.press("Home")
    assert page.locator("#weights").input_value() == "1 -2 0.25"
    assert page.locator("#absmax").inner_text() == "2.00000000"
    box = slider.bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + 2)
    assert float(page.locator("#weights").input_value().split()[1]) > 1.5


@pytest.mark.parametrize("typed", ["", "1 two 3", "nan", "1e39", "inf", "0 " * 257])
def test_the_playground_says_what_is_wrong_with_what_was_typed(address, page, typed):
    page.goto(address + "playground/")
    before = page.locator("#packed").inner_text()
    page.locator("#weights").fill(typed)
    assert page.locator("#problem").inner_text()
    assert page.locator("#packed").inner_text() == before
