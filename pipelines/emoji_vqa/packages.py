"""The packages that EmojiVQA's drawings come from: pinned versions, their digests and licences. None of them is shipped.

`npm pack` of npm's own client fetches an archive, since it knows a site's mirror; without npm the public registry is asked over
HTTPS. Whatever lies in the folder already is taken if its digest is the pinned one.
"""

import base64
import hashlib
import shutil
import subprocess
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from switchkd.errors import DataError, RunError
from switchkd.pipelines.run_folder import write_atomically

REGISTRY = "https://registry.npmjs.org"
TIMEOUT = 60  # seconds without an answer of the registry


@dataclass(frozen=True)
class Package:
    """One npm package with the drawings of one artist."""

    artist: str
    name: str
    version: str
    integrity: str  # "sha512-" and the digest of the archive in base64, as npm's registry states it
    licence: str
    holder: str

    @property
    def archive(self) -> str:
        """The file name that `npm pack` gives the archive."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"

    @property
    def url(self) -> str:
        """Where the public registry has the archive."""
        return f"{REGISTRY}/{self.name}/-/{self.name.rpartition('/')[2]}-{self.version}.tgz"


PACKAGES = (
    Package(
        "openmoji",
        "openmoji",
        "17.0.0",
        "sha512-EBnYrNGdcdw+OSXmENeNE1yBNRu6tOraTmoOyUbJkTmvT/+XETp8RZLSJFzD3lrPc5N9CzsyPnRTk0Vp4UaI9w==",
        "CC BY-SA 4.0",
        "OpenMoji, HfG Schwäbisch Gmünd",
    ),
    Package(
        "noto",
        "@iconify-json/noto",
        "1.2.9",
        "sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
        "Apache-2.0",
        "Google, Noto Emoji; packed by Iconify",
    ),
    Package(
        "twemoji",
        "@iconify-json/twemoji",
        "1.2.5",
        "sha512-uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        "CC BY 4.0",
        "Twitter, Twemoji; packed by Iconify",
    ),
    Package(
        "fluent-flat",
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
        "MIT",
        "Microsoft, Fluent Emoji; packed by Iconify",
    ),
    Package(
        "fluent-3d",
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "sha512-Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
        "MIT",
        "Microsoft, Fluent Emoji; packed by LobeHub",
    ),
)


def integrity_of(path: Path) -> str:
    """Return the digest of a file in the form of `Package.integrity`."""
    return "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()


def fetch(folder: Path, packages: Sequence[Package] = PACKAGES) -> dict[str, Path]:
    """Return artist → archive in `folder`; those that are missing are fetched.

    Raises:
        DataError: an archive's digest is not the pinned one.
        RunError: an archive cannot be fetched, with the cause.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for package in packages:
        path = folder / package.archive
        if not path.is_file():
            _pack(package, folder)
        if (found := integrity_of(path)) != package.integrity:
            raise DataError(
                f"{path} is not the pinned archive of {package.name}@{package.version}: expected {package.integrity}, found "
                f"{found}; remove it, and it is fetched again"
            )
    return {package.artist: folder / package.archive for package in packages}


def _pack(package: Package, folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        _download(package, folder / package.archive)
        return
    command = [npm, "pack", "--silent", f"{package.name}@{package.version}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode or not (folder / package.archive).is_file():
        raise RunError(f"{' '.join(command)} failed: {(done.stderr or done.stdout).strip()[-500:]}")


def _download(package: Package, path: Path) -> None:
    try:
        with urllib.request.urlopen(package.url, timeout=TIMEOUT) as answer:
            content = answer.read()
    except OSError as error:
        raise RunError(
            f"{path} is missing, there is no npm to fetch it, and {package.url} cannot be read: {error}; run "
            f"`npm pack {package.name}@{package.version}` elsewhere and put the archive there"
        ) from None
    write_atomically(path, content)
