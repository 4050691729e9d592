"""DMSConfig checks itself: every problem at once, named, with what was given and what is allowed."""

import copy
import dataclasses
import json
import pickle

import pytest
from evicting import embedded

from dms.config import DMSConfig


def test_all_problems_are_told_at_once():
    with pytest.raises(ValueError) as caught:
        DMSConfig(windw=4, granularity="token", tau=0, sinks=True, scale="100", offset=float("inf"))
    assert str(caught.value).split("; ") == [
        "unknown key 'windw' (did you mean 'window'?)",
        "allowed: window, gate, granularity, alignment, tau, scale, offset, sinks, kv_dtype",
        "granularity: Input should be 'head' or 'layer'",
        "given: 'token'",
        "tau: Input should be greater than 0",
        "given: 0",
        "sinks: Input should be a valid integer",
        "given: True",
        "scale: Input should be a valid number",
        "given: '100'",
        "offset: Input should be a finite number",
        "given: inf",
    ]


@pytest.mark.parametrize("value", [4.0, None, "4", True, -1])
def test_a_window_is_a_whole_number(value):
    with pytest.raises(ValueError, match=r"window: Input should be .*; given: "):
        DMSConfig(window=value)


@pytest.mark.parametrize("value", [[8], [8, 8], [16, 8], [-1, 8], [1, 2, 3, 4, 5], [1.0, 2], [True, 2], []])
def test_several_windows_rise(value):
    with pytest.raises(
        ValueError, match=r"window: Input should be a number of tokens, or 2 to 4 rising ones, such as \[24, 96, 384\]; given: "
    ):
        DMSConfig(window=value)


def test_several_windows_are_a_window_of_several_numbers():
    config = DMSConfig(window=[4, 16, 64], sinks=2)
    assert config.window == config.windows == (4, 16, 64)
    assert DMSConfig(window=4).windows == (4,)
    saved = config.to_saved()
    assert saved["window"] == [4, 16, 64] and saved["format_version"] == 2
    assert DMSConfig.from_saved(json.loads(json.dumps(saved)), "here") == config
    assert dataclasses.replace(config, sinks=3).windows == (4, 16, 64)
    assert hash(config) == hash(DMSConfig(window=(4, 16, 64), sinks=2))


@pytest.mark.parametrize(
    ("window", "message"),
    [
        (2048, r"window is 2048 and the model's context is 2048 tokens: nothing could ever be evicted"),
        (
            (8, 2048),
            r"window is \[8, 2048\] and the model's context is 2048 tokens: decisions of 2048 could never count; choose windows below",
        ),
        ((8, 4096, 5000), r"decisions of 4096, 5000 could never count"),
    ],
)
def test_windows_are_below_the_context(window, message):
    with pytest.raises(ValueError, match=message):
        embedded(window)
    DMSConfig(window=window).check_context(5001)


def test_other_windows_are_as_many():
    assert DMSConfig(window=[4, 16], sinks=1).with_window([16, 64]) == DMSConfig(window=[16, 64], sinks=1)
    assert DMSConfig(window=4).with_window(16) == DMSConfig(window=4).with_window([16]) == DMSConfig(window=16)
    with pytest.raises(ValueError, match=r"window is \[16\] and the gates were trained with \[4, 16\]: .*give as many"):
        DMSConfig(window=[4, 16]).with_window(16)
    with pytest.raises(ValueError, match="2 to 4 rising ones"):
        DMSConfig(window=[4, 16]).with_window([16, 16])


def test_one_window_is_saved_as_before():
    saved = DMSConfig(window=4).to_saved()
    assert saved["format_version"] == 1 and saved["window"] == 4


def test_whole_numbers_serve_as_others():
    config = DMSConfig(scale=1, offset=0)
    assert (config.scale, config.offset) == (1.0, 0.0) and type(config.scale) is type(config.offset) is float


def test_it_is_a_frozen_value():
    config = DMSConfig(window=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.window = 4
    assert dataclasses.replace(config, window=4) == DMSConfig(window=4) != config
    with pytest.raises(ValueError, match="window: Input should be greater than or equal to 0; given: -4"):
        dataclasses.replace(config, window=-4)
    for same in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert same == config and hash(same) == hash(config)
    with pytest.raises(TypeError):
        DMSConfig(3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"windw": 8}, r"unknown key 'windw' \(did you mean 'window'\?\); allowed: window, gate, granularity"),
        ({"allignment": "own"}, "did you mean 'alignment'"),
        ({"zzzz": 1}, "unknown key 'zzzz'; allowed"),
        ({"window": -1}, "window.*given: -1"),
        ({"window": "8"}, "window.*given: '8'"),
        ({"alignment": "previous"}, "'own' or 'next'.*given: 'previous'"),
        ({"granularity": "token"}, "'head' or 'layer'.*given: 'token'"),
        ({"tau": 0.0}, "tau.*given: 0.0"),
        ({"scale": float("nan")}, "scale"),
        ({"sinks": 1.5}, "sinks.*given: 1.5"),
    ],
)
def test_config_is_strict(fields, message):
    with pytest.raises(ValueError, match=message):
        DMSConfig(**fields)


def test_pages_of_fewer_bits_are_another_format():
    config = DMSConfig(window=4, kv_dtype="int4")
    saved = config.to_saved()
    assert (saved["format_version"], saved["kv_dtype"]) == (2, "int4") and DMSConfig.from_saved(saved, "here") == config
    assert "kv_dtype" not in DMSConfig(window=4).to_saved()
    with pytest.raises(ValueError, match="here: format_version is 1, window 4, gate 'linear' and kv_dtype 'int4'"):
        DMSConfig.from_saved(saved | {"format_version": 1}, "here")
    with pytest.raises(ValueError, match="kv_dtype: Input should be 'int8' or 'fp8' or 'int4' or None; given: 'int2'"):
        DMSConfig(kv_dtype="int2")


def test_config_is_saved_and_read():
    config = DMSConfig(window=8, alignment="next", sinks=2)
    saved = config.to_saved()
    assert saved["format_version"] == 1 and DMSConfig.from_saved(saved, "here") == config
    with pytest.raises(ValueError, match="here: format_version is 3, this version of dms reads 1 and 2"):
        DMSConfig.from_saved(saved | {"format_version": 3}, "here")
    with pytest.raises(ValueError, match=r"here: .*'sideways'"):
        DMSConfig.from_saved(saved | {"alignment": "sideways"}, "here")
