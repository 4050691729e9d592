"""Options of the plugin, and what of a folder it reads."""

from types import SimpleNamespace

import pytest
from served import make_folder

from dms.io.gates_file import read_gates
from dms_vllm.settings import Options, Served


def options(**given) -> Options:
    return Options.of(SimpleNamespace(additional_config={"dms": given}))


def test_options_are_read():
    assert options(page_size=32, evict_bias=-1) == Options(page_size=32, evict_bias=-1)
    assert Options.of(SimpleNamespace(additional_config=None)) == Options.of(SimpleNamespace(additional_config={"other": 1})) == Options()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"evict_bais": 1}, r"dms has no option 'evict_bais' \(did you mean 'evict_bias'\?\); it has evict_bias, page_size"),
        ({"page_size": 8}, "dms.page_size is 8; a page holds 16, 32 or 64 entries"),
        ({"pages_per_voucher": 0}, "dms.pages_per_voucher is 0; it is a number of pages from 1"),
        ({"prefix_every": -1}, "dms.prefix_every is -1; it is a number of tokens, or 0"),
        ({"evict_bias": "1"}, "dms.evict_bias is '1'; it is a number"),
        ({"evict_bias": True}, "dms.evict_bias is True; it is a number"),
    ],
)
def test_options_are_checked(given, said):
    with pytest.raises(ValueError, match=said):
        options(**given)


def test_a_folder_is_read_without_its_weights(tmp_path):
    served = Served.of(str(make_folder(tmp_path, (4, 12), sinks=2)))
    assert served.config.windows == (4, 12) and served.config.sinks == 2
    tensors, metadata = read_gates(served.folder)
    assert served.tensors.keys() == tensors.keys() and served.metadata == metadata
    layers = served.layers()
    assert [layer.index for layer in layers.gated] == [0, 1, 2, 3] and not layers.following and not layers.skipped
    assert all(parameter.is_meta for layer in layers.gated for parameter in layer.module.parameters())
    served.check_weights()
