"""Drawings of our own, as the packages have them."""

import drawn_packages
import pytest


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """(folder, packages) of archives with a few drawings."""
    folder = tmp_path_factory.mktemp("packages")
    return folder, drawn_packages.write_archives(folder)
