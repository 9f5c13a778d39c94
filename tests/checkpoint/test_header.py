"""Headers: every broken file is told apart, and what is accepted is what the safetensors library reads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from simmerge.checkpoint.header import DTYPES, MAX_HEADER_BYTES, read_header
from simmerge.errors import CheckpointError

VALID = save(
    {
        "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.ones(3, dtype=np.float16),
        "empty": np.zeros((0, 4), dtype=np.float32),
        "scalar": np.array(7, dtype=np.int64),
    },
    metadata={"format": "pt"},
)


def encode(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(start: int, end: int, dtype: str = "U8", shape: Any = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


BAD: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "at least 8 bytes, this one has 0"),
    "seven bytes": (b"1234567", "at least 8 bytes, this one has 7"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "header too long": (
        (MAX_HEADER_BYTES + 1).to_bytes(8, "little"),
        "at most 100000000 bytes, got 100000001",
    ),
    "header past the end": ((50).to_bytes(8, "little") + b"{}", "has 50 bytes but only 2 follow"),
    "empty header": (encode(b""), "must start with '{'"),
    "leading space": (encode(b" {}"), "must start with '{'"),
    "not utf-8": (encode(b'{"\xff": 1}'), "not UTF-8"),
    "not json": (encode(b"{]"), "not valid JSON"),
    "nan": (encode(b'{"a": NaN}'), "NaN is not JSON"),
    "huge integer": (encode(b'{"a": ' + b"9" * 5000 + b"}"), "not valid JSON"),
    "deep": (encode(b'{"a":' + b"[" * 100_000), "nested too deeply"),
    "surrogate": (encode(b'{"\\ud800": {"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), "surrogate"),
    "duplicate tensor": (
        encode(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}'),
        "'a' stands twice",
    ),
    "duplicate field": (
        encode(b'{"a":{"dtype":"U8","dtype":"I8","shape":[0],"data_offsets":[0,0]}}'),
        "'dtype' stands twice",
    ),
    "metadata list": (encode({"__metadata__": []}), "'__metadata__' must be an object, got list"),
    "metadata number": (encode({"__metadata__": {"k": 1}}), "must map strings to strings, got 'k': 1"),
    "tensor not object": (encode({"t": [1]}), "tensor 't' must be described by an object"),
    "missing field": (encode({"t": {"dtype": "U8", "shape": [0]}}), "must have the fields"),
    "extra field": (encode({"t": {**entry(0, 0), "x": 1}}), "must have the fields"),
    "unknown dtype": (encode({"t": entry(0, 1, "Q4")}, b"0"), "unknown dtype 'Q4'"),
    "dtype no string": (encode({"t": {**entry(0, 1), "dtype": ["U8"]}}, b"0"), "unknown dtype"),
    "negative shape": (encode({"t": entry(0, 1, shape=[-1, -1])}, b"0"), "non-negative integers"),
    "minus zero": (
        encode(b'{"t":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'),
        "non-negative integers",
    ),
    "fraction": (encode({"t": entry(0, 1, shape=[1.0])}, b"0"), "non-negative integers"),
    "true": (encode({"t": entry(0, 1, shape=[True])}, b"0"), "non-negative integers"),
    "shape no list": (encode({"t": entry(0, 1, shape=1)}, b"0"), "non-negative integers"),
    "shape too large": (encode({"t": entry(0, 0, shape=[2**62, 4, 0])}), "below 2^63"),
    "negative offset": (
        encode({"t": {**entry(0, 1), "data_offsets": [-1, 0]}}, b"0"),
        "ascending data_offsets",
    ),
    "descending": (encode({"t": {**entry(0, 1), "data_offsets": [1, 0]}}, b"0"), "ascending data_offsets"),
    "three offsets": (
        encode({"t": {**entry(0, 1), "data_offsets": [0, 1, 1]}}, b"0"),
        "ascending data_offsets",
    ),
    "wrong size": (
        encode({"t": entry(0, 7, "F32", [2])}, b"0" * 7),
        "takes 8 bytes, its data_offsets give 7",
    ),
    "overlap": (encode({"a": entry(0, 4), "b": entry(2, 6)}, b"0" * 6), "'b' overlaps tensor 'a' by 2 bytes"),
    "same bytes": (encode({"a": entry(0, 4), "b": entry(0, 4)}, b"0" * 4), "overlaps tensor 'a' by 4"),
    "hole": (
        encode({"a": entry(0, 2), "b": entry(3, 4)}, b"0" * 4),
        "1 bytes between tensor 'a' and tensor 'b'",
    ),
    "hole at start": (encode({"a": entry(1, 2)}, b"00"), "1 bytes between the header and tensor 'a'"),
    "truncated": (encode({"a": entry(0, 9)}, b"0" * 5), "truncated: tensor 'a'"),
    "trailing": (encode({"a": entry(0, 1)}, b"000"), "2 bytes after tensor 'a' belong to no tensor"),
    "only trailing": (encode({}, b"000"), "3 bytes after the header"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_broken_file_is_refused_with_its_name_and_the_reason(case: str, tmp_path: Path) -> None:
    content, message = BAD[case]
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_header(file)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize("make", [lambda p: p / "none", lambda p: p], ids=["missing", "folder"])
def test_a_path_that_is_no_file_is_refused(make: Callable[[Path], Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(make(tmp_path))


def test_a_valid_header_says_where_each_tensor_lies(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(VALID)
    header = read_header(file)
    assert list(header.tensors) == ["a.weight", "b", "empty", "scalar"]
    assert header.metadata == {"format": "pt"}
    matrix = header.tensors["a.weight"]
    assert (matrix.dtype, matrix.shape, matrix.count, matrix.nbytes) == ("F32", (2, 3), 6, 24)
    stored = np.frombuffer(VALID[matrix.start : matrix.end], dtype="<f4")
    assert stored.tolist() == [0, 1, 2, 3, 4, 5]
    scalar = header.tensors["scalar"]
    assert (scalar.shape, scalar.count, scalar.is_float) == ((), 1, False)
    assert header.tensors["empty"].nbytes == 0


def test_a_file_without_tensors_is_a_valid_file(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(encode({}))
    assert read_header(file).tensors == {}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_library_agrees_on_every_dtype_and_its_width(dtype: str, tmp_path: Path) -> None:
    content = encode({"t": entry(0, 3 * DTYPES[dtype], dtype, [3])}, b"\1" * 3 * DTYPES[dtype])
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    assert read_header(file).tensors["t"].nbytes == len(safetensors.deserialize(content)[0][1]["data"])


def agrees_with_the_library(content: bytes, file: Path) -> None:
    """The property of the fuzzing: a CheckpointError, or exactly what the library reads."""
    file.write_bytes(content)
    try:
        tensors = read_header(file).tensors
    except CheckpointError:
        return
    ours = {name: (info.dtype, list(info.shape), content[info.start : info.end]) for name, info in tensors.items()}
    library = {name: (t["dtype"], t["shape"], bytes(t["data"])) for name, t in safetensors.deserialize(content)}
    assert ours == library


HEADER_END = 8 + int.from_bytes(VALID[:8], "little")
FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(
    edits=st.lists(
        st.tuples(
            st.integers(0, HEADER_END - 1),
            # Half of the bytes are such as JSON is made of, or most edits would only break the syntax.
            st.one_of(st.integers(0, 255), st.sampled_from(list(b'0123456789-,.:[]{}" eEF\\u'))),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_fuzzed_bytes_of_a_header(edits: list[tuple[int, int]], tmp_path: Path) -> None:
    content = bytearray(VALID)
    for position, value in edits:
        content[position] = value
    agrees_with_the_library(bytes(content), tmp_path / "x.safetensors")


@FUZZ
@given(cut=st.integers(0, len(VALID)), extra=st.binary(max_size=4))
def test_fuzzed_length_of_a_file(cut: int, extra: bytes, tmp_path: Path) -> None:
    agrees_with_the_library(VALID[:cut] + extra, tmp_path / "x.safetensors")


NUMBERS = st.one_of(st.integers(-1, 12), st.sampled_from([2**31, 2**63, 2**64, 2**70, 1.0, None, True, "1", -0.0]))
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "F16", "F32", "C64", "F4", "u8", None]),
        "shape": st.one_of(st.lists(NUMBERS, max_size=3), NUMBERS),
        "data_offsets": st.lists(NUMBERS, min_size=1, max_size=3),
    },
    optional={"extra": st.none()},
)


@FUZZ
@given(
    header=st.dictionaries(
        st.sampled_from(["a", "b", "", "é", "__metadata__"]),
        st.one_of(ENTRIES, st.dictionaries(st.text(max_size=2), st.text(max_size=2), max_size=2), NUMBERS),
        max_size=3,
    ),
    size=st.integers(0, 16),
)
def test_fuzzed_structure_of_a_header(header: dict[str, Any], size: int, tmp_path: Path) -> None:
    agrees_with_the_library(encode(header, bytes(size)), tmp_path / "x.safetensors")


@FUZZ
@given(
    sizes=st.lists(st.integers(0, 4), max_size=4),
    order=st.randoms(use_true_random=False),
    slack=st.sampled_from([0, 0, 0, 1]),
)
def test_fuzzed_layouts_that_are_valid_are_accepted(sizes: list[int], order: Any, slack: int, tmp_path: Path) -> None:
    header, position = {}, 0
    for i, size in enumerate(sizes):
        header[f"t{i}"] = entry(position, position + size)
        position += size
    names = list(header)
    order.shuffle(names)
    content = encode({name: header[name] for name in names}, bytes(position + slack))
    file = tmp_path / "x.safetensors"
    agrees_with_the_library(content, file)
    if slack:
        with pytest.raises(CheckpointError, match="belong to no tensor"):
            read_header(file)
    else:
        assert set(read_header(file).tensors) == set(header)
