"""Random numbers of machine code are those of the published generator, number by number."""

from __future__ import annotations

import ctypes
import math

import pytest

from pyro_hamflow.programs.engines.model_library import HEADERS
from pyro_hamflow.programs.machine_code import compiler

NUMBERS = """
extern "C" void numbers(uint64_t seed, uint64_t chain, uint64_t draw, double* out, long n) {
  Random random(seed, chain, draw);
  for (long i = 0; i < n; i++) out[i] = random.uniform();
}
extern "C" void normals(uint64_t seed, uint64_t chain, uint64_t draw, double* out, long n) {
  Random random(seed, chain, draw);
  random.normals(out, n);
  out[n] = random.uniform();
}
"""
STREAM = 2**40 + 3, 2, 2**33 + 1  # seed, chain, draw


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    source = [HEADERS["kernels"], "using Real = double;", HEADERS["call"], NUMBERS]
    path = tmp_path_factory.mktemp("random") / "numbers.so"
    path.write_bytes(compiler.compiled("\n".join(source), "-march=native"))
    return ctypes.CDLL(str(path))


def made(function, count, room, stream=STREAM):
    out = (ctypes.c_double * room)()
    function(*map(ctypes.c_uint64, stream), out, ctypes.c_long(count))
    return list(out)


def philox(key, place):
    """Ten rounds of Philox4x32: Salmon et al. (2011)."""
    (k0, k1), (c0, c1, c2, c3) = key, place
    for _ in range(10):
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1 = (second >> 32) ^ c1 ^ k0, second & 0xFFFFFFFF
        c2, c3 = (first >> 32) ^ c3 ^ k1, first & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def known_uniforms(count, stream=STREAM):
    seed, chain, draw = stream
    numbers = []
    for block in range((count + 1) // 2):
        key = seed % 2**32, seed >> 32
        c0, c1, c2, c3 = philox(key, (block, chain, draw % 2**32, draw >> 32))
        numbers += [((bits >> 12) + 0.5) * 2.0**-52 for bits in (c1 << 32 | c0, c3 << 32 | c2)]
    return numbers[:count]


def test_the_published_numbers():
    """The authors' own example, of zeros."""
    assert philox((0, 0), (0, 0, 0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)


@pytest.mark.parametrize("stream", [STREAM, (0, 0, 0), (2**64 - 1, 7, 2**64 - 1)])
def test_uniform_numbers_are_those_published(library, stream):
    assert made(library.numbers, 101, 101, stream) == known_uniforms(101, stream)


@pytest.mark.parametrize("count", [1, 2, 7, 10, 32, 33, 101])
def test_normal_numbers_are_those_of_the_uniform(library, count):
    """However many are asked for, and what comes after them too."""
    used = 2 * ((count + 1) // 2)
    uniforms = known_uniforms(used + 1)
    expected = []
    for first, second in zip(uniforms[:used:2], uniforms[1:used:2], strict=True):
        radius, angle = math.sqrt(-2.0 * math.log(first)), 2.0 * math.pi * second
        expected += [radius * math.cos(angle), radius * math.sin(angle)]
    found = made(library.normals, count, count + 1)
    assert found[:count] == pytest.approx(expected[:count], rel=1e-12, abs=1e-12)
    assert found[count] == uniforms[used]
