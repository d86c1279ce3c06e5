"""Memory that a training program keeps from one step to the next."""

import ctypes
import os
import platform
import subprocess
import sys

import pytest

from jaxrl_llm import runtime

FAULTS = """
import ctypes, resource
from jaxrl_llm import runtime

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: pages are small, also where Linux makes all of them huge

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    place = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(3 << 30)))
    ctypes.memset(place, 1, 1 << 26)  # 64 MiB of 3 GiB, written and freed
    libc.free(place)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

runtime.keep_memory()
first, second = faults(), faults()
runtime.return_memory()
print(first, second, faults())
"""
PAGES = (1 << 26) // 2 / os.sysconf("SC_PAGE_SIZE")  # half of those of 64 MiB, for what is left and right of them


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this is about glibc")
@pytest.mark.parametrize("tuned", [{}, {"MALLOC_ARENA_MAX": "4"}, {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}])
def test_freed_memory_is_kept_until_it_is_returned_unless_the_user_has_tuned_malloc(tuned):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", FAULTS], env=kept | tuned, capture_output=True, text=True, check=True)
    first, second, third = map(int, done.stdout.split())
    assert first > PAGES and third > PAGES
    assert (second > PAGES) if tuned else second < PAGES / 100


@pytest.mark.parametrize("libc", [("", ""), ("musl", "1.2.5")])
def test_another_c_library_is_left_alone(monkeypatch, libc):
    """Python has the name of glibc's version with musl too, which has no mallopt."""
    monkeypatch.setattr(platform, "libc_ver", lambda: libc)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("a library was opened"))
    runtime.keep_memory()
    runtime.return_memory()
