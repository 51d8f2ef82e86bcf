import dataclasses
import json
import struct

import pytest
import safetensors.torch
import torch

from lipfast import masks, priors
from lipfast.errors import InputError, TicketError
from lipfast.tickets import Ticket, description, packing

TINY = {"in_channels": 4, "down": [6, 6], "skip": 2}


def ticket_of(config, share, seed=3, **changes):
    """A ticket that keeps the largest ``1 - share`` of a fresh network's weights."""
    network = priors.build("skip", config, seed)
    state = network.state_dict()
    full = masks.full(state, priors.prunable(network))
    pruned = masks.prune_globally(full, state, int(share * masks.total(full)))
    fields = {
        "prior": "skip",
        "config": network.config,
        "seed": seed,
        "state": state,
        "masks": pruned,
        "task": {"name": "denoise", "sigma": 25.0},
        "target": "degraded",
        "round": 7,
        "provenance": {"images": ["astronaut"]},
    }
    return Ticket(**{**fields, **changes})


@pytest.fixture
def ticket():
    return ticket_of(TINY, 0.7)


@pytest.fixture
def path(ticket, tmp_path):
    ticket.save(tmp_path / "t.safetensors")
    return tmp_path / "t.safetensors"


def same_bits(left, right):
    return left.keys() == right.keys() and all(
        torch.equal(
            left[name].view(torch.uint8) if left[name].dim() else left[name],
            right[name].view(torch.uint8) if right[name].dim() else right[name],
        )
        for name in left
    )


@pytest.mark.parametrize("share", [0.0, 0.5, 0.97, 1.0])
def test_round_trip_is_bit_exact(tmp_path, share):
    ticket = ticket_of(TINY, share)
    size = ticket.save(tmp_path / "t.safetensors")
    assert size == (tmp_path / "t.safetensors").stat().st_size
    loaded = Ticket.load(tmp_path / "t.safetensors")
    assert same_bits(loaded.state, ticket.state)
    assert same_bits(loaded.masks, ticket.masks)
    assert list(loaded.masks) == list(ticket.masks)  # the order decides ties in further rounds
    assert loaded.to_bytes() == ticket.to_bytes()
    for name in ("prior", "config", "seed", "task", "target", "round", "provenance", "sparsity", "kept", "total"):
        assert getattr(loaded, name) == getattr(ticket, name), name


def test_tuples_are_lists_as_in_the_file(tmp_path):
    fields = {"task": {"name": "mine", "shape": (3, 4)}, "provenance": {"sides": ({"px": (1, 2)},)}}
    ticket = ticket_of({**TINY, "down": (4, 6)}, 0.5, **fields)
    ticket.save(tmp_path / "t.safetensors")
    loaded = Ticket.load(tmp_path / "t.safetensors")
    assert (loaded.task, loaded.provenance) == (ticket.task, ticket.provenance)
    assert ticket.task["shape"] == [3, 4]
    assert ticket.provenance == {"sides": [{"px": [1, 2]}]}


def test_to_model_gives_the_rewound_weights_with_exact_zeros(path, ticket):
    state = Ticket.load(path).to_model().state_dict()
    assert same_bits(state, ticket.state)
    for name, mask in ticket.masks.items():
        assert state[name][~mask].view(torch.int32).eq(0).all()


def test_a_model_of_two_networks_is_refused():
    wider = dataclasses.replace(ticket_of(TINY, 0.7), config={**TINY, "down": [6, 7]})
    with pytest.raises(TicketError, match=r"^this ticket: belongs to another network: .* must be \("):
        wider.to_model()


def test_dead_weights_are_zeroed_on_creation():
    fresh = priors.build("skip", TINY, 3)
    ticket = ticket_of(TINY, 0.7)
    name = next(iter(ticket.masks))
    assert fresh.state_dict()[name][~ticket.masks[name]].abs().sum() > 0
    assert ticket.state[name][~ticket.masks[name]].abs().sum() == 0


def test_size_at_ninety_percent_is_at_most_a_seventh_of_dense(tmp_path):
    ticket = ticket_of({}, 0.9)
    assert ticket.sparsity == pytest.approx(0.9, abs=1e-6)
    dense = len(safetensors.torch.save(ticket.to_model().state_dict()))
    assert ticket.save(tmp_path / "t.safetensors") <= 0.14 * dense


def test_bits_are_packed_lowest_first():
    mask = torch.tensor([True, False, False, True, False, False, False, False, True, False])
    values, bits = packing.pack(torch.arange(10.0), mask)
    assert values.tolist() == [0.0, 3.0, 8.0]
    assert bits.tolist() == [0b00001001, 0b00000001]


def test_an_existing_ticket_survives_a_failed_write(path, ticket, monkeypatch):
    before = path.read_bytes()

    def full_disk(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(InputError, match="No space left on device"):
        ticket.save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def nest(depth):
    """``depth`` lists in each other."""
    nested = []
    for _ in range(depth - 1):
        nested = [nested]
    return nested


def with_tensor(name, tensor):
    return {"state": {**ticket_of(TINY, 0.7).state, name: tensor}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (with_tensor("output.bias", torch.zeros(3).double()), "tensor 'output.bias' has type torch.float64"),
        (with_tensor("output.bias", torch.zeros(3).bfloat16()), "tensor 'output.bias' has type torch.bfloat16"),
        (with_tensor("output.bias", torch.tensor([0.0, 1.0, float("nan")])), "'output.bias' holds NaN or infinity"),
        (with_tensor("extra", torch.zeros(3)), "has an extra tensor 'extra'"),
        ({"seed": -1}, "seed must be a whole number below 2.63, got -1"),
        ({"round": -1}, "round must be a whole number, got -1"),
        ({"target": "foo"}, "target must be degraded or clean, got 'foo'"),
        ({"config": {**TINY, "down": [6, 7]}}, "belongs to another network"),
        ({"prior": "vgg"}, "unknown prior 'vgg'"),
        ({"provenance": {"pictures": ["baby"]}}, "each of provenance's pictures must have a name"),
        ({"provenance": {"psnr": float("nan")}}, "'provenance' cannot be written as JSON"),
        ({"provenance": {"mask": torch.ones(2)}}, "'provenance' cannot be written as JSON .*Tensor"),
        ({"provenance": {"a": 1, 2: 3}}, "'provenance' cannot be written as JSON"),
        ({"provenance": {1: 2}}, "'provenance' cannot be written as JSON .its keys must be texts"),
        ({"provenance": {"a": [{None: 2}]}}, "'provenance' cannot be written as JSON .its keys must be texts"),
        ({"task": {"name": "mine", "scales": {0.5: 1}}}, "'task' cannot be written as JSON .its keys must be texts"),
        ({"provenance": {"deep": nest(100_000)}}, "nested more than 64 deep"),
        ({"task": {"name": "denoise", "sigma": float("inf")}}, "'task' cannot be written as JSON"),
        ({"task": {"name": "inpaint", "sides": {1, 2}}}, "'task' cannot be written as JSON .*set"),
        ({"config": {**TINY, "skip": torch.tensor(2)}}, "'prior' cannot be written as JSON .*Tensor"),
    ],
)
def test_what_could_not_be_read_again_is_not_written(tmp_path, changes, message):
    with pytest.raises(TicketError, match=f"this ticket: .*{message}"):
        dataclasses.replace(ticket_of(TINY, 0.7), **changes).save(tmp_path / "t.safetensors")
    assert list(tmp_path.iterdir()) == []


# ---- files that nobody vouches for ----


def test_every_truncation_is_refused(path, tmp_path):
    content = path.read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in [0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 1]:
        cut.write_bytes(content[:length])
        with pytest.raises(TicketError, match=r"cut\.safetensors"):
            Ticket.load(cut)


def test_a_flipped_bit_anywhere_is_refused(path, tmp_path):
    content = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    flipped = tmp_path / "flipped.safetensors"
    for position in torch.randint(len(content), (200,), generator=generator).tolist():
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position % 8)
        flipped.write_bytes(damaged)
        with pytest.raises(TicketError):
            Ticket.load(flipped)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a whole safetensors file"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 100, "not a whole safetensors file"),
        (struct.pack("<Q", 2**63) + b"{}", "not a whole safetensors file"),
        (safetensors.torch.save({"weight": torch.ones(2)}), "no lipfast ticket"),
        (safetensors.torch.save({"weight": torch.ones(2)}, {"lipfast": "[]"}), "not a lipfast ticket"),
        (safetensors.torch.save({"weight": torch.ones(2)}, {"lipfast": "[" * 100_000}), "nested more than 64 deep"),
        (safetensors.torch.save({"weight": torch.ones(2)}, {"lipfast": " " * (1 << 21)}), "at most 1048576 are read"),
    ],
)
def test_foreign_files_are_refused(tmp_path, content, message):
    (tmp_path / "foreign").write_bytes(content)
    with pytest.raises(TicketError, match=message):
        Ticket.load(tmp_path / "foreign")


def test_a_deep_description_is_refused_at_any_depth():
    """Python's writer of JSON gives up a little before its reader, how deep depends on the calls around them."""
    for depth in range(description.DEEPEST_NEST, 1001):  # the document itself is one more
        nested = "[" * depth + "]" * depth
        with pytest.raises(TicketError, match="deep: the description is nested more than 64 deep"):
            description.read(f'{{"format":"lipfast-ticket","version":1,"deep":{nested}}}', "deep")


def test_the_deepest_nest_that_is_read_is_written_too(ticket):
    """The document and its provenance are two levels."""
    allowed = description.DEEPEST_NEST - 2
    assert dataclasses.replace(ticket, provenance={"deep": nest(allowed)}).to_bytes()
    with pytest.raises(TicketError, match="this ticket: the description is nested more than 64 deep"):
        dataclasses.replace(ticket, provenance={"deep": nest(allowed + 1)}).to_bytes()


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-1e999"])
def test_an_empty_checksum_stands_for_nothing(number):
    """Such numbers have no canonical text and so no checksum; once it was taken for an empty one."""
    text = f'{{"format":"lipfast-ticket","version":1,"provenance":{{"x":{number}}},"sha256":""}}'
    with pytest.raises(TicketError, match="forged: the description is not JSON"):
        description.read(text, "forged")


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(TicketError, match=r"none\.safetensors: cannot read this ticket: No such file"):
        Ticket.load(tmp_path / "none.safetensors")
    with pytest.raises(TicketError, match="Is a directory"):
        Ticket.load(tmp_path)


def forge(path, tmp_path, change_fields=None, change_tensors=None):
    """A file with changed content whose checksums are all right: only the checks of meaning can refuse it."""
    with safetensors.safe_open(path, framework="pt") as file:
        fields = json.loads(file.metadata()["lipfast"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del fields["sha256"]
    if change_tensors:
        change_tensors(tensors)
    fields["tensors_sha256"] = description.checksum(tensors)
    if change_fields:
        change_fields(fields)
    forged = tmp_path / "forged.safetensors"
    forged.write_bytes(safetensors.torch.save(tensors, {"lipfast": description.write(fields, "forged")}))
    return forged


def test_the_forgery_itself_is_sound(path, tmp_path):
    assert Ticket.load(forge(path, tmp_path)).to_bytes() == path.read_bytes()


FIRST = "encoder.0.skip.weight"  # (2, 4, 1, 1): 8 weights, 1 byte of mask


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.update(version=2), "ticket format 2 but this lipfast reads 1"),
        (lambda f: f.update(round=-1), "round must be a whole number"),
        (lambda f: f.update(round=True), "'round' is missing or of the wrong kind"),
        (lambda f: f.update(sparsity=0.99), r"says sparsity 0\.99, its masks have 0\.6998"),
        (lambda f: f.update(sparsity=1), r"says sparsity 1, its masks have 0\.6998"),
        (lambda f: f.update(sparsity=True), "'sparsity' is missing or of the wrong kind"),
        (lambda f: f.pop("sparsity"), "'sparsity' is missing"),
        (lambda f: f.update(target="both"), "target must be degraded or clean"),
        (lambda f: f.pop("task"), "'task' is missing"),
        (lambda f: f["prior"].update(kind="vgg"), "unknown prior 'vgg'"),
        (lambda f: f["prior"].update(kind=3), "must hold a kind and a config"),
        (lambda f: f["prior"].update(seed=-1), "seed must be a whole number"),
        (lambda f: f["prior"]["config"].update(wings=2), "cannot be built"),
        (lambda f: f["prior"]["config"].update(down=[2**40, 6]), "at most 4096 is read"),
        (lambda f: f["prior"]["config"].update(down=[6] * 100_000), "at most 64"),
        (lambda f: f["prior"]["config"].update(down={"a": 1}), "holds a dict"),
        (lambda f: f["prior"]["config"].update(down="no", up="no"), "cannot be built"),
        (lambda f: f["prior"]["config"].update(down=[6, 7], up=[6, 7]), "belongs to another network"),
        (lambda f: f["prior"].update(kind="decoder", config={"k": 6}), "belongs to another network: it has an extra"),
        (lambda f: f["pruned"][FIRST].update(kept=1), "its description says 1"),
        (lambda f: f["pruned"][FIRST].update(shape=[2, 4, 1, -1]), "needs a shape of whole numbers"),
        (lambda f: f["pruned"][FIRST].update(shape=[2**30] * 8), "the mask of .* weights must be"),
        (lambda f: f["pruned"][FIRST].update(shape=[8, 1, 1, 1]), "belongs to another network"),
        (lambda f: f["pruned"].pop(FIRST), "belongs to another network"),
        (lambda f: f["pruned"].update({"ghost": {"shape": [8], "kept": 1}}), "pruned tensor 'ghost' needs"),
        (lambda f: f.update(prior={"kind": "decoder", "config": {"k": 1.5}, "seed": 0}), "k must be a whole number"),
        (lambda f: f["prior"]["config"].update(bias="no"), "bias must be True or False, got 'no'"),
        (lambda f: f["provenance"].update(pictures=3), "pictures must be a list, got int"),
        (lambda f: f["provenance"].update(pictures=["baby"]), "each of provenance's pictures must have a name"),
        (lambda f: f["provenance"].update(pictures=[{"name": 3}]), "each of provenance's pictures must have a name"),
        (lambda f: f.update(tensors_sha256="0" * 64), "the tensors do not match their checksum"),
    ],
)
def test_forged_descriptions_are_refused(path, tmp_path, change, message):
    with pytest.raises(TicketError, match=message):
        Ticket.load(forge(path, tmp_path, change_fields=change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({FIRST + ":mask": torch.zeros(9, dtype=torch.uint8)}), "must be 1 bytes"),
        (lambda t: t.update({FIRST + ":mask": torch.zeros(1, dtype=torch.int64)}), "must be 1 bytes"),
        (lambda t: t.update({FIRST + ":mask": torch.full((1,), 255, dtype=torch.uint8)}), "the mask keeps 8 weights"),
        (lambda t: t.update({FIRST + ":values": t[FIRST + ":values"].to(torch.int64)}), "must be 1-D float32"),
        (lambda t: t.update({FIRST: torch.zeros(2, 4, 1, 1)}), "no more"),
        (lambda t: t.update({"extra": torch.zeros(1)}), "has an extra tensor 'extra'"),
        (lambda t: t.pop("output.bias"), "lacks tensor 'output.bias'"),
        (lambda t: t.update({"output.bias": torch.zeros(4)}), r"'output.bias' must be \(3,\)"),
        (lambda t: t.update({"output.bias": torch.zeros(3, dtype=torch.int64)}), "'output.bias' must be"),
        (lambda t: t.update({"output.bias": torch.zeros(3).half()}), "has type torch.float16"),
        (lambda t: t.update({"output.bias": torch.tensor([0.0, 1.0, float("nan")])}), "holds NaN or infinity"),
    ],
)
def test_forged_tensors_are_refused(path, tmp_path, change, message):
    with pytest.raises(TicketError, match=message):
        Ticket.load(forge(path, tmp_path, change_tensors=change))


def test_bits_past_the_last_weight_are_refused():
    with pytest.raises(TicketError, match="bits set past its last weight"):
        packing.unpack(torch.zeros(1), torch.tensor([0b10000001], dtype=torch.uint8), (7,), "w")
