"""The console in a real browser: what a shop owner does with it, and what others may have typed."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.browser import AXE, DESKTOP, PHONE, chromium, colours, findings, messages, resize
from helpers.console import Page, serving
from helpers.empty_bundle import empty_bundle
from helpers.objects import photographs, video

from device_runtime.install.bundle import install

CONSOLE = Path(__file__).resolve().parents[3] / "device_runtime" / "serve" / "console"
MARKUP = '<img src=x onerror="document.title=1">'

needs_ffmpeg = pytest.mark.skipif(not shutil.which("ffmpeg"), reason="no ffmpeg here (Debian: apt install ffmpeg)")


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root without classes."""
    folder = tmp_path_factory.mktemp("empty")
    (folder / "objects.ssdedge").write_bytes(empty_bundle())
    install(folder / "root", folder / "objects.ssdedge")
    return folder / "root"


@pytest.fixture
def root(empty: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(empty, tmp_path / "root", symlinks=True)
    return tmp_path / "root"


@pytest.fixture
def cameras(tmp_path: Path) -> list[str]:
    """Options of three cameras, each with a video of one object that is turned."""
    found = []
    for name in ("ball", "box", "wedge"):
        video(tmp_path / f"{name}.mjpeg", name)
        found += ["--camera", f"{name}={tmp_path / name}.mjpeg"]
    return found


def test_no_file_of_the_page_asks_another_server_or_needs_inline_code() -> None:
    for path in CONSOLE.iterdir():
        if path.is_dir():
            continue
        text = path.read_text(encoding="utf-8")
        if path.name != "vendor.js":
            assert not re.search(r"""https?://(?!www\.w3\.org/)[\w.]+\.\w""", text), path.name
        assert "innerHTML" not in text or path.name == "vendor.js", path.name
        for imported in re.findall(r'from "\./([\w.]+)"', text):
            assert (CONSOLE / imported).is_file(), f"{path.name} imports {imported}"
    page = (CONSOLE / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|style=|\son\w+=|<script(?! type=\"module\" src=)", page)


@needs_ffmpeg
@pytest.mark.parametrize("size", [DESKTOP, pytest.param(PHONE, marks=pytest.mark.slow)], ids=["desktop", "phone"])
def test_a_shop_owner_teaches_corrects_and_undoes(
    root: Path, cameras: list[str], tmp_path: Path, size: tuple[int, int]
) -> None:
    bars = photographs(tmp_path / "photographs" / "bar", "bar", 12)
    with serving(root, *cameras) as address, chromium(size) as driver:
        page = Page(driver, address)
        page.see("Nothing learned yet", ".answer")

        page.look_through("ball")
        page.hold("red ball", by="touch" if size == PHONE else "mouse")
        page.see("Learned: red ball", "#teach")
        assert re.search(r"\d+ of \d+", page.text("#teach .job"))
        page.look_through("box")
        page.hold("blue box", by="Space")
        page.see("Learned: blue box", "#teach")
        driver.find_element("css selector", "input[webkitdirectory]").send_keys(str(bars))
        page.see("12 pictures", "dialog")
        page.type_into("dialog input", MARKUP)
        page.press("Teach", "dialog")
        page.see(f"Learned: {MARKUP}", "#teach")

        page.press("OK", "#teach")
        page.see("blue box", ".answer .what")
        page.look_through("ball")
        page.see("red ball", ".answer .what")

        page.look_through("wedge")  # nobody has taught it: it is unknown or called something else
        page.go("sort")
        moments = page.wait("moments", lambda: driver.find_elements("css selector", ".moment"))
        assert moments
        for _ in range(3):
            _put_all(page, "yellow wedge")
            if "are needed" not in page.text(".basket"):
                break
        page.press("Learn", ".basket")
        page.see("Learned: yellow wedge", ".onto")
        page.go("live")
        page.see("yellow wedge", ".answer .what")

        page.go("known")
        page.see("4 things known")
        page.see(MARKUP, ".classes")  # as text
        page.press("Undo")
        page.see("3 things known")
        page.see("Not in use now: Learned yellow wedge")
        page.press("Take that back")
        page.see("4 things known")
        page.go("history")
        page.see(f"Learned {MARKUP}")
        page.press("Go back to here: step 2")
        page.press("Go there", "dialog")
        page.see("You went back")
        driver.refresh()
        page.go("known")
        page.see("1 thing known")
        page.see("red ball", ".classes")
        assert driver.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        assert "Known" in driver.title, "markup in a name was run"
        assert not messages(driver)


def _put_all(page: Page, name: str) -> None:
    """Choose every moment and put it onto a name."""
    moments = page.wait("moments", lambda: page.driver.find_elements("css selector", '.moment[aria-pressed="false"]'))
    for moment in moments:
        moment.click()
    page.type_into(".onto input", name)
    page.press("Put there")
    page.see("different view", ".basket")


def learn(root: Path, folder: Path, **labels: str) -> None:
    """Teach objects under names."""
    from device_runtime.device import Device

    with Device.open(root) as device:
        for name, label in labels.items():
            device.learn(label, sorted(photographs(folder / name, name, 10).iterdir()))


@pytest.fixture
def taught(root: Path, tmp_path: Path) -> Path:
    """A root that knows three things, one of them with markup in its name."""
    learn(root, tmp_path / "taught", ball=MARKUP, box="blue box", bar="green bar")
    return root


@pytest.fixture
def page(taught: Path) -> Iterator[Page]:
    """The console of that root without a camera, on a desktop."""
    with serving(taught) as address, chromium() as driver:
        yield Page(driver, address)


@pytest.mark.slow
def test_markup_in_a_name_is_shown_as_text(page: Page) -> None:
    for view, css in (("known", ".classes"), ("history", ".steps"), ("sort", ".targets")):
        page.go(view)
        page.see(MARKUP, css)
    page.go("known")
    page.press(f"Forget {MARKUP}")
    page.see(f"Forget {MARKUP}?", "dialog h2")
    assert page.driver.title != "1"
    assert not page.driver.find_elements("css selector", 'img[src="x"]')
    assert not messages(page.driver)


def nothing_is_out_of_reach(page: Page) -> None:
    """Fail if axe-core finds something serious or critical, light or dark, or if the page is wider than the screen."""
    for dark in (False, True):
        colours(page.driver, dark)
        assert findings(page.driver) == [], "dark" if dark else "light"
    assert page.driver.execute_script("return document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.slow
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_nothing_is_out_of_reach_in_any_view(page: Page, size: tuple[int, int]) -> None:
    resize(page.driver, size)
    page.see("green bar")
    for view in ("live", "sort", "known", "history", "device"):
        page.go(view)
        nothing_is_out_of_reach(page)
        for opener in {"known": ("Rename", "Merge", "Forget"), "history": ("Go back",)}.get(view, ()):
            page.press(opener)
            nothing_is_out_of_reach(page)
            page.press("Cancel", "dialog")
            assert page.driver.switch_to.active_element.accessible_name.startswith(opener)
    assert not messages(page.driver)


@pytest.mark.slow
def test_the_camera_of_the_browser_teaches_and_is_answered(root: Path, tmp_path: Path) -> None:
    film = video(tmp_path / "ball.mjpeg", "ball", each=8)
    with serving(root) as address, chromium(PHONE, False, f"use-file-for-fake-video-capture={film}") as driver:
        page = Page(driver, address)
        page.hold_without_effect("red ball")
        page.see("First switch on the camera", "#teach")
        page.press("Use this camera")
        page.wait("a picture", lambda: driver.execute_script("return document.querySelector('video').videoWidth"))
        page.click(driver.find_element("css selector", '#teach input[type="checkbox"]'))  # presses, without holding
        page.press("Start", "#teach")
        page.wait("views", lambda: page.views() >= 5)
        page.press("Stop", "#teach")
        page.see("Learned: red ball", "#teach")
        page.see("red ball", ".answer .what")
        nothing_is_out_of_reach(page)
        assert not messages(driver)


@pytest.mark.slow
def test_a_page_without_a_secure_context_says_that_it_gets_no_camera(root: Path) -> None:
    flags = ("host-resolver-rules=MAP shop.test 127.0.0.1",)
    with serving(root, "--allow-host", "shop.test") as address, chromium(PHONE, False, *flags) as driver:
        page = Page(driver, address.replace("127.0.0.1", "shop.test"))
        page.see("only for pages with https://", ".picture")


@pytest.mark.slow
def test_letting_go_too_early_keeps_what_was_seen(root: Path, cameras: list[str]) -> None:
    with serving(root, *cameras) as address, chromium() as driver:
        page = Page(driver, address)
        page.look_through("ball")
        page.hold("red ball", views=0)
        page.see("are needed. Hold again", "#teach")
        page.hold("red ball", by="Enter")
        page.see("Learned: red ball", "#teach")
        page.go("history")
        page.see("Step 2")
        assert "Step 3" not in page.text(".steps")


@pytest.mark.slow
def test_files_that_are_no_pictures_are_named_and_left_out(root: Path, tmp_path: Path) -> None:
    folder = photographs(tmp_path / "bar", "bar", 10)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    (folder / "notes.txt").write_text("left out", encoding="utf-8")
    with serving(root) as address, chromium() as driver:
        page = Page(driver, address)
        driver.find_element("css selector", "input[webkitdirectory]").send_keys(str(folder))
        page.see("11 pictures", "dialog")
        page.press("Teach", "dialog")
        page.see("1 file could not be used: broken.jpg", "#teach")
        two = [str(path) for path in sorted(photographs(tmp_path / "few", "box", 2).iterdir())]
        page.type_into("#teach input", "box")
        driver.find_element("css selector", "input[accept]").send_keys("\n".join(two))
        page.see("box was not taught: 2 of 2 pictures are different views, and at least 3 are needed", ".notices")


@pytest.mark.slow
def test_a_refusal_of_the_guard_is_explained(taught: Path, tmp_path: Path) -> None:
    folder = photographs(tmp_path / "wrong", "ball", 12, seed=300)
    with serving(taught) as address, chromium() as driver:
        page = Page(driver, address)
        page.type_into("#teach input", "blue box")
        pictures = "\n".join(map(str, sorted(folder.iterdir())))
        driver.find_element("css selector", "input[accept]").send_keys(pictures)
        page.see("Not learned, to protect what it knows", "#teach")
        page.see("Nothing was changed. What usually helps", "#teach")
        assert "--force" not in page.text("#teach")
        nothing_is_out_of_reach(page)


@pytest.mark.slow
def test_signing_in(root: Path, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("a-token-of-the-shop\n", encoding="ascii")
    token.chmod(0o600)
    with serving(root, "--token-file", token) as address, chromium(PHONE) as driver:
        page = Page(driver, address)
        page.see("Sign in", "h1")
        nothing_is_out_of_reach(page)
        page.type_into("input", "a-wrong-token-of-mine")
        page.press("Sign in")
        page.see("the token is wrong", "form")
        page.type_into("input", "a-token-of-the-shop")
        page.press("Sign in")
        page.see("Nothing learned yet")
        page.go("device")
        page.press("Sign out")
        page.see("Sign in", "h1")

        driver.get(f"{address}/#token=a-token-of-the-shop")
        page.see("Nothing learned yet")
        assert "token" not in driver.current_url
        driver.refresh()
        page.see("Nothing learned yet")


@pytest.mark.slow
def test_a_service_that_is_gone_is_noticed_and_found_again(taught: Path) -> None:
    with chromium() as driver:
        with serving(taught) as address:
            page = Page(driver, address)
            page.see("Connected", "header")
        page.see("No connection", "header")
        with serving(taught, port=int(address.rpartition(":")[2])):
            page.see("Connected", "header")
            page.go("known")
            page.see("3 things known")
            page.press("Rename green bar")
            page.type_into("dialog input", "blue box")
            page.press("Rename", "dialog")
            page.see("blue box", ".notices")  # the sentence of the device: that name is taken


@pytest.mark.slow
def test_things_are_renamed_merged_and_forgotten_and_a_backup_is_saved(page: Page, tmp_path: Path) -> None:
    page.go("known")
    page.press("Rename green bar")
    page.type_into("dialog input", "cucumber")
    page.press("Rename", "dialog")
    page.see("Renamed green bar to cucumber", ".undo")
    page.press("Merge cucumber")
    page.wait("the choice", lambda: page.driver.find_element("css selector", "dialog select")).send_keys("blue box")
    page.see("blue box", "dialog fieldset")
    page.press("Merge", "dialog")
    page.see("2 things known")
    page.see("20 pictures", ".classes")
    page.press("Undo")
    page.see("3 things known")
    page.press("Forget blue box")
    page.see("What it learned from 10 pictures is taken out", "dialog")
    page.press("Forget blue box", "dialog")
    page.see("2 things known")
    page.see("Forgot blue box", ".undo")
    page.see("What is left of it", ".undo")
    page.go("device")
    page.driver.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path / "saved")}
    )
    page.press("Save a backup")
    (saved,) = page.wait("the backup", lambda: list((tmp_path / "saved").glob("*.ssdedge")))
    install(tmp_path / "other", saved)
    assert not messages(page.driver)


@needs_ffmpeg
@pytest.mark.slow
def test_moments_and_folders_can_be_dragged(root: Path, cameras: list[str], tmp_path: Path) -> None:
    from selenium.webdriver import ActionChains

    learn(root, tmp_path / "taught", ball="red ball", box="blue box")
    folder = photographs(tmp_path / "drop" / "bar", "bar", 8, seed=600)
    with serving(root, *cameras[4:]) as address, chromium() as driver:
        page = Page(driver, address)
        page.see("Camera wedge")
        middle = driver.execute_script(
            "const {x, y, width, height} = document.getElementById('teach').getBoundingClientRect();"
            "return {x: x + width / 2, y: y + height / 2}"
        )
        data = {"items": [], "files": [str(folder)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            driver.execute_cdp_cmd("Input.dispatchDragEvent", {"type": kind, "data": data, **middle})
        page.see("What does the folder bar show?", "dialog")
        page.see("8 pictures", "dialog")
        nothing_is_out_of_reach(page)
        page.press("Cancel", "dialog")
        page.see("Not sure what this is", ".answer")
        nothing_is_out_of_reach(page)

        page.go("sort")
        moment = page.wait("a moment", lambda: driver.find_elements("css selector", ".moment"))[0]
        ActionChains(driver).drag_and_drop(moment, page.button("blue box", ".targets")).perform()
        page.see("blue box", ".basket")
        page.see("different view", ".basket")
        nothing_is_out_of_reach(page)
        page.press("Discard", ".basket")
        page.wait("no basket", lambda: not driver.find_elements("css selector", ".basket"))
        assert not messages(driver)


@pytest.mark.slow
def test_what_comes_from_npm_is_built_again_byte_for_byte(tmp_path: Path) -> None:
    if not shutil.which("npm"):
        pytest.skip("no npm here (https://nodejs.org)")
    made = ["make", "console", f"VENDORED={tmp_path}", f"AXE={tmp_path}"]
    done = subprocess.run(made, cwd=CONSOLE.parents[2], capture_output=True, text=True, check=False)
    if "ENOTFOUND" in done.stderr or "EAI_AGAIN" in done.stderr or "ECONNREFUSED" in done.stderr:
        pytest.skip("npm reaches no registry")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "vendor.js").read_bytes() == (CONSOLE / "vendor.js").read_bytes()
    assert (tmp_path / "axe.min.js").read_bytes() == AXE.read_bytes()
