"""Files of learned parts: foreign and damaged ones are told, none runs code, none stays open."""

from __future__ import annotations

import io
import os
import pickle
import random
import resource
import zipfile

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hamflow import (
    AutoNeuralHamiltonianFlow,
    PotentialNetwork,
    learn_surrogate,
)
from pyro_hamflow.files import FileFault


def decay():
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    pyro.sample("y", dist.Normal(rate, 1.0).expand([3]).to_event(1), obs=torch.ones(3))


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    sizes = {"num_sets": 64, "training_steps": 5, "disable_progbar": True}
    return PotentialNetwork(2, hidden=(4,)), learn_surrogate(decay, **sizes)


@pytest.fixture(params=["network", "surrogate"])
def saved(request, networks, tmp_path):
    """A loader and a file that it reads."""
    thing = networks[request.param == "surrogate"]
    path = tmp_path / "learned.pt"
    thing.save(path)
    return type(thing).load, path


def _open_files():
    return {os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if _is_open(n)}


def _is_open(number):
    return os.path.lexists(f"/proc/self/fd/{number}")


class Malice:
    """What makes a file, where the process stands, if it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch i_was_here",)


def _zip_of_text():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "hello")
    return file.getvalue()


def _torch_of(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


FOREIGN = {
    "nothing": b"",
    "text": b"site,value\n1,2\n",
    "a letter": b"e",
    "latin": "Größe".encode("latin-1"),
    "noise": random.Random(1).randbytes(4000),
    "zip": _zip_of_text(),
    "pickle": pickle.dumps({"sizes": {}, "weights": {}}),
    "code": pickle.dumps(Malice()),
    "code of torch": _torch_of({"sizes": Malice(), "weights": {}}),
    "tensor": _torch_of(torch.ones(3)),
    "list": _torch_of([1, 2]),
    "state": _torch_of(torch.nn.Linear(2, 2).state_dict()),
    "module": _torch_of(torch.nn.Linear(2, 2)),
    "other format": _torch_of({"format": "pyro_hamflow run", "version": 1}),
    "later version": _torch_of({"format": None, "version": 99, "sizes": {}, "weights": {}}),
    "no weights": _torch_of({"sizes": {"dimension": 2}, "weights": {}}),
    "weights of nothing": _torch_of({"sizes": {"dimension": 2}, "weights": None}),
    "strange sizes": _torch_of({"sizes": {"wheels": 4}, "weights": {"centre": torch.ones(2)}}),
    "huge": _torch_of({"sizes": {"dimension": 10**7}, "weights": {"centre": torch.ones(2)}}),
    "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(2000),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files_are_refused(saved, name, tmp_path, monkeypatch):
    load, path = saved
    monkeypatch.chdir(tmp_path)
    path.write_bytes(FOREIGN[name])
    before = _open_files()
    with pytest.raises(FileFault, match=f"'{path}' .*(potential network|surrogate|version)"):
        load(path)
    assert _open_files() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_damaged_files_are_refused(saved):
    """Cut anywhere, or with any byte changed, a file is refused, or is read as it was written."""
    load, path = saved
    whole, generator = path.read_bytes(), random.Random(2)
    before = _open_files()
    weights = _weights(load(path))
    for _ in range(40):
        path.write_bytes(whole[: generator.randrange(len(whole))])
        with pytest.raises(FileFault):
            load(path)
    refused = 0
    for _ in range(200):
        place = generator.randrange(len(whole))
        changed = whole[place] ^ (1 << generator.randrange(8))
        path.write_bytes(whole[:place] + bytes([changed]) + whole[place + 1 :])
        try:
            again = _weights(load(path))
        except FileFault:
            refused += 1
        else:  # a byte of the archive that nothing is read of
            assert all(torch.equal(again[name], part) for name, part in weights.items())
    assert refused > 20
    assert _open_files() == before


def _weights(thing):
    network = thing if isinstance(thing, PotentialNetwork) else thing.network
    return network.state_dict()


def test_no_file_and_folders_are_told(saved, tmp_path):
    load, _ = saved
    with pytest.raises(FileNotFoundError, match="absent"):
        load(tmp_path / "absent.pt")
    with pytest.raises(IsADirectoryError):
        load(tmp_path)


def test_files_say_what_they_are(saved):
    _, path = saved
    content = torch.load(path, weights_only=True)
    assert content["format"] in (
        "pyro_hamflow potential network",
        "pyro_hamflow amortised surrogate",
    )
    assert content["version"] == 1


def test_loading_moves_no_random_state(saved):
    load, path = saved
    before = torch.get_rng_state()
    load(path)
    assert torch.equal(torch.get_rng_state(), before)


def test_full_disk_leaves_the_old_file(networks, tmp_path):
    """Here the process may write no more than a few bytes."""
    network, _ = networks
    path = tmp_path / "network.pt"
    network.save(path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises((OSError, RuntimeError)):
            PotentialNetwork(30, hidden=(64, 64)).save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert PotentialNetwork.load(path).sizes == network.sizes
    assert [part.name for part in tmp_path.iterdir()] == ["network.pt"]


def test_guide_refuses_the_state_of_something_else():
    guide = AutoNeuralHamiltonianFlow(decay, hidden=(4,))
    with pytest.raises(ValueError, match="the state has .* and so on: expected"):
        guide.load_state_dict(torch.nn.Linear(2, 2).state_dict())
    guide.prepare()
    with pytest.raises(ValueError, match="the state has .* and so on: expected"):
        guide.load_state_dict(torch.nn.Linear(2, 2).state_dict())
