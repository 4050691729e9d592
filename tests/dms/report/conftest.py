"""An evaluation as `dms evaluate` leaves it, small enough to run once for all tests of the report."""

import os

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")

import pytest


@pytest.fixture(scope="session")
def real_evaluation(tmp_path_factory):
    """(model folder, evaluation folder): two lengths, one of them beyond training, three policies, two operating points, hyper-scaling."""
    from evicting import embedded

    from dms.evaluation.command import evaluate_folder
    from dms.evaluation.engine.settings import EvaluationSettings, ScalingSettings
    from dms.io import checkpoint

    root = tmp_path_factory.mktemp("real")
    model, tokenizer = embedded()
    model.dms.trained_length = 96
    folder = checkpoint.save(model, root / "model", tokenizer=tokenizer, base_name="builtin:tiny", target_cr=2.0)
    settings = EvaluationSettings(
        policies=["dense", "dms", "sliding_window"],
        suites=["records", "text"],
        lengths=[96, 128],
        evict_bias=[0.0, 1.0],
        num_documents=2,
        batch_size=2,
        prefill_chunk=128,
        num_greedy=1,
        scaling=ScalingSettings(num_problems=2, max_k=2, max_new_tokens=2, num_hops=2),
    )
    evaluate_folder(str(folder), settings, out=root / "evaluation")
    return folder, root / "evaluation"
