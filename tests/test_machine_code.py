"""What is read of the compiled CUDA kernels: the record, and that what is worse, or not good enough, is said."""

import importlib.util
import sys
from pathlib import Path

import pytest

CUDA = Path(__file__).parent / "cuda"


@pytest.fixture(scope="module")
def resources():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(CUDA)])
        specification = importlib.util.spec_from_file_location("resources", CUDA / "resources.py")
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
    return module


def test_all_architectures_have_the_same_kernels(resources):
    table = resources.read()
    kernels = {arch: {name for name, of in table if of == arch} for arch in resources.READ}
    assert all(found == kernels[resources.READ[0]] for found in kernels.values())


def test_the_record_is_as_good_as_all_have_to_be(resources):
    assert list(resources.shortcomings(resources.read())) == []


WORSE = [
    ("moments_kernel<float,contiguous,4>", "flight", 7, "flight 7, 8 at least"),
    ("moments_kernel<float,contiguous,4>", "path", 1441, "path 1441, 1440 at most"),
    ("moments_kernel<float,contiguous,4>", "wide", 15, "wide 15, 16 at least"),
    ("apply_kernel<BFloat16,channels_last,8,false>", "wide", 31, "wide 31, 32 at least"),
    ("grad_sums_kernel<BFloat16,contiguous,8,false>", "flight", 3, "flight 3, 4 at least"),
    ("grad_apply_kernel<double,contiguous,2,false>", "wide", 47, "wide 47, 48 at least"),
    ("slab_forward_kernel<BFloat16,8,4,false,false>", "wide", 7, "wide 7, 8 at least"),
    ("slab_backward_kernel<BFloat16,8,8,false,true,true>", "wide", 23, "wide 23, 24 at least"),
    ("row_forward_kernel<BFloat16,float,8,1,false,false>", "wide", 15, "wide 15, 16 at least"),
    ("row_backward_kernel<BFloat16,float,8,4,shared,false>", "wide", 11, "wide 11, 12 at least"),
    ("row_backward_kernel<BFloat16,float,8,2,cluster,true>", "flight", 7, "flight 7, 8 at least"),
    ("long_row_forward_kernel<BFloat16,8>", "path", 1441, "path 1441, 1440 at most"),
    ("long_row_sums_kernel<float,4>", "flight", 3, "flight 3, 4 at least"),
    ("long_row_backward_kernel<Half,8>", "wide", 47, "wide 47, 48 at least"),
    ("wide_slab_backward_kernel<BFloat16,8,4>", "wide", 11, "wide 11, 12 at least"),
    ("merge_kernel<float>", "divisions", 1, "divisions 1, 0 at most"),
    ("apply_kernel<BFloat16,contiguous,1,false>", "spilled", 8, "spilled 8, 0 at most"),
]


@pytest.mark.parametrize("name, field, value, sentence", WORSE)
def test_what_is_not_good_enough_is_said(resources, name, field, value, sentence):
    fields = resources.read()[name, "90"] | {field: value}
    assert list(resources.shortcomings({(name, "90"): fields})) == [f"{name} for sm_90: {sentence}"]


@pytest.mark.parametrize("name", ["apply_kernel<float,contiguous,1,false>", "column_sums_kernel<float>"])
def test_single_elements_and_merges_are_not_asked_for_vectors(resources, name):
    fields = resources.read()[name, "90"] | {"wide": 0, "flight": 1, "path": 9999}
    assert list(resources.shortcomings({(name, "90"): fields})) == []


def test_what_got_worse_is_said(resources):
    key = "merge_kernel<float>", "90"
    before = resources.read()[key]
    assert list(resources.problems({key: before}, {key: before})) == []
    for field, value in (("blocks", before["blocks"] - 1), ("narrow", before["narrow"] + 1)):
        (said,) = resources.problems({key: before | {field: value}}, {key: before})
        assert said == f"merge_kernel<float> for sm_90: {field} {value}, {before[field]} in the table"


def test_vectors_of_a_thread(resources):
    """Those that its instructions handle; short rows are taken several at a time."""
    for name, vectors, elements in (
        ("slab_forward_kernel<float,4,8,false,false>", 8, 4),
        ("row_forward_kernel<Half,Half,8,2,false,false>", 8, 8),
        ("row_forward_kernel<float,float,1,4,false,false>", 4, 1),
        ("row_backward_kernel<double,double,2,6,shared,false>", 6, 2),
        ("moments_kernel<float,channels_last,4>", 16, 4),
    ):
        assert resources.vectors_of_thread(*resources.parts(name)) == vectors
        assert resources.vector_size(*resources.parts(name)) == elements
