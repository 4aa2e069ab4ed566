"""The pytest plugin and ``parametrize_with_checks``, each in a pytest of its own.

What subjects in processes of their own add is seen by the first test, of both verdicts; the others do without.
"""

from __future__ import annotations

import pytest

from mla_spec.installed import all_laws, quick_laws

pytest_plugins = ["pytester"]

SUBJECTS = """
from mla_spec.adapters.pytorch import TorchAbsorbed

class Good(TorchAbsorbed):
    name = "good"

class Wrong(TorchAbsorbed):
    name = "wrong"
    def rotate(self, x, cos, sin, interleaved):
        return super().rotate(2 * x, cos, sin, interleaved)
"""
LAWS = sum(made.check.__module__ == "mla_spec.properties.test_rope" for made in all_laws().values())
"""Laws in the module that ``ROPE`` runs; six of them see the factor 2."""
ROPE = (
    "--pyargs",
    "mla_spec.properties.test_rope",
    "--mla-examples",
    "8",
    "--mla-seed",
    "0",
    "-p",
    "no:xdist",
    "-p",
    "no:cacheprovider",
)
HERE = (*ROPE, "--mla-in-process")


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makepyfile(kernels=SUBJECTS)
    return pytester


def test_subjects_are_chosen_by_option(project: pytest.Pytester) -> None:
    done = project.runpytest_subprocess(*ROPE, "--mla-impl", "kernels.py:Good", "--mla-impl", "kernels.py:Wrong", "-v")
    done.assert_outcomes(passed=2 * LAWS - 6, failed=6)
    done.stdout.fnmatch_lines(
        [
            "*test_rope_agrees_with_reference*kernels.py:Good* PASSED*",
            "*test_rope_agrees_with_reference*kernels.py:Wrong* FAILED*",
            "*replay: mla-spec check kernels.py:Wrong --law test_rope_*",
        ]
    )


def test_subjects_are_chosen_by_environment(project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLA_IMPL", "kernels.py:Good, torch-explicit")
    project.runpytest_subprocess(*HERE).assert_outcomes(passed=2 * LAWS)


def test_an_unknown_subject_is_one_sentence(project: pytest.Pytester) -> None:
    done = project.runpytest_subprocess(*ROPE, "-k", "norm", "--mla-impl", "torch-absorbt")
    assert done.ret != 0
    done.stdout.fnmatch_lines(["*unknown subject 'torch-absorbt'; did you mean torch-absorbed*"])


def test_waivers_expect_failure_and_stale_ones_are_reported(project: pytest.Pytester) -> None:
    project.makefile(
        ".txt",
        waived="""
        # our rotation is fused elsewhere
        test_rope_agrees_with_reference
        test_rope_preserves_norm[kernels.py:Wrong]
        test_rope_at_position_zero_is_identity[kernels.py:Wrong]
        test_rope_takes_positions_in_any_order[kernels.py:Wrong]
        test_rope_depends_on_relative_position_only[kernels.py:Wrong]  # same
        test_rope_of_many_wide_heads[kernels.py:Wrong]
        test_rope_that_was_renamed
        """,
    )
    done = project.runpytest_subprocess(*HERE, "--mla-impl", "kernels.py:Wrong", "--mla-xfails", "waived.txt")
    done.assert_outcomes(passed=LAWS - 6, xfailed=6, warnings=1)
    done.stdout.fnmatch_lines(["*StaleXfail: waived.txt: 'test_rope_that_was_renamed' names no collected test*"])


def test_a_file_of_other_bytes_is_a_usage_error(project: pytest.Pytester) -> None:
    (project.path / "ids.txt").write_bytes(b"\xff\xfe\x00")
    done = project.runpytest_inprocess(*ROPE, "--mla-impl", "kernels.py:Good", "--mla-xfails", "ids.txt")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines(["*--mla-xfails: cannot read ids.txt: it is not UTF-8*"])


def test_a_missing_waiver_file_is_a_usage_error(project: pytest.Pytester) -> None:
    done = project.runpytest_inprocess(*ROPE, "--mla-impl", "kernels.py:Good", "--mla-xfails", "none.txt")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines(["*--mla-xfails: cannot read none.txt: No such file or directory*"])


def test_parametrize_with_checks(project: pytest.Pytester) -> None:
    project.makepyfile(
        test_mine="""
        from kernels import Good, Wrong
        from mla_spec import parametrize_with_checks
        from mla_spec.judging.law import Options

        @parametrize_with_checks([Good(), Wrong()], options=Options(examples=8, seed=0, dtypes=("float32",)))
        def test_mla(subject, check):
            check(subject)
        """
    )
    done = project.runpytest_subprocess("-k", "rope_layouts or rope_agrees", "-v", "-p", "no:xdist")
    done.assert_outcomes(passed=3, failed=1, skipped=2)  # compiled laws are skipped
    done.stdout.fnmatch_lines(["*test_mla?wrong-test_rope_agrees_with_reference? FAILED*"])


def test_unsupported_laws_are_skipped_with_the_reason(project: pytest.Pytester) -> None:
    done = project.runpytest_subprocess(
        "--pyargs", "mla_spec.properties.test_decode", "--mla-impl", "torch-sdpa", "--mla-examples", "4", "--mla-seed", "0", "-rs",
        "-k", "lse", "-p", "no:xdist", "--mla-in-process",
    )  # fmt: skip
    done.assert_outcomes(skipped=2)
    done.stdout.fnmatch_lines(["*decode returns no LSE*"])


@pytest.mark.parametrize(
    ("options", "outcome"), [(("--mla-in-process",), {"skipped": 1}), (("--mla-compile", "eager"), {"passed": 1})]
)
def test_compiled_laws_run_where_a_backend_is_named(
    project: pytest.Pytester, options: tuple[str, ...], outcome: dict[str, int]
) -> None:
    law = ("--pyargs", "mla_spec.properties.test_compiled", "-k", "rope", "-rs", "--mla-seed", "0", "-p", "no:xdist")
    done = project.runpytest_subprocess(*law, "--mla-impl", "kernels.py:Good", *options)
    done.assert_outcomes(**outcome, deselected=2)
    if "--mla-compile" not in options:
        done.stdout.fnmatch_lines(["*not asked for: --compile BACKEND*"])


def test_a_quick_check_leaves_other_laws_out(project: pytest.Pytester) -> None:
    laws = [name for name, made in all_laws().items() if made.check.__module__ == "mla_spec.properties.test_rope"]
    elementary = len(quick_laws().keys() & set(laws))
    done = project.runpytest_subprocess(*HERE, "--mla-impl", "kernels.py:Good", "--mla-quick", "--mla-no-minimise")
    done.assert_outcomes(passed=elementary, deselected=LAWS - elementary)
    done.stdout.fnmatch_lines(["mla-spec: a quick check: docs/quick_check.md says what it leaves out"])


def test_no_time_to_minimise_is_refused(project: pytest.Pytester) -> None:
    done = project.runpytest_inprocess(*ROPE, "--mla-impl", "kernels.py:Good", "--mla-minimise-seconds", "0")
    done.stdout.fnmatch_lines(["*--mla-minimise-seconds must be positive, got 0.0"])
