"""Memory that a training program keeps from one step to the next."""

import os
import subprocess
import sys

import pytest

FAULTS = """
import resource
from jaxrl_llm import runtime

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(1 << 26)  # 64 MiB, written and freed
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

runtime.keep_memory()
first, second = faults(), faults()
runtime.return_memory()
print(first, second, faults())
"""
PAGES = (1 << 26) // 2 / os.sysconf("SC_PAGE_SIZE")  # half of those of 64 MiB, for what is left and right of them


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in getattr(os, "confstr_names", ()), reason="this is about glibc")
@pytest.mark.parametrize("tuned", [{}, {"MALLOC_ARENA_MAX": "4"}, {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}])
def test_freed_memory_is_kept_until_it_is_returned_unless_the_user_has_tuned_malloc(tuned):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", FAULTS], env=kept | tuned, capture_output=True, text=True, check=True)
    first, second, third = map(int, done.stdout.split())
    assert first > PAGES and third > PAGES
    assert (second > PAGES) if tuned else second < PAGES / 100
