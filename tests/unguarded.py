"""The code against faults and bad input taken away, piece by piece, each with the test that misses it.

Tried by `pytest -m acceptance tests/test_mutations.py`, listed in tests/README.md: `python tests/unguarded.py` prints
that table.
"""

from mutations import Mutation, table

FILES = "dino/files.py"
CHECKPOINT = "dino/checkpoint.py"
IMAGES = "dino/images.py"
RESUMABLE = "pipelines/training/resumable.py"
FEATURES = "pipelines/evaluation/feature_file.py"
LABELS = "pipelines/evaluation/labelled.py"
PARAMS = "pipelines/params.py"
TRACKING = "pipelines/rows/tracking.py"
FAULTS = "pipelines/test_faults.py"
SPOILT = "pipelines/test_bad_input.py::test_a_file_that_is_none_is_told_with_its_cure"
UNFITTING = "pipelines/test_bad_input.py::test_features_and_labels_that_do_not_fit_are_told"

UNGUARDED = [
    # faults
    Mutation("disk full", "the half-written file stays", FILES,
             "    finally:\n        _remove(aside)", "    finally:\n        pass",
             "dino/test_checkpoint.py::test_a_failed_write_leaves_the_old_file_and_nothing_else"),
    Mutation("disk full", "written in place", FILES,
             'aside = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")', "aside = path",
             "dino/test_checkpoint.py::test_a_failed_write_leaves_the_old_file_and_nothing_else"),
    Mutation("disk full", "not told what is needed", FILES,
             "if not lacks_room(error):\n            raise", "if True:\n            raise",
             "dino/test_files.py::test_a_full_disk_leaves_the_old_file_and_says_what_is_needed"),
    Mutation("disk full", "a table's size is not known before", IMAGES,
             "whole_file(path, needs_bytes) as aside", "whole_file(path) as aside",
             f"{FAULTS}::test_a_disk_that_is_full_leaves_no_half_prepared_table"),
    Mutation("read-only folder", "found out after the work", FILES,
             "        aside.touch()  # before the work that is to be written, not after it\n", "",
             "dino/test_files.py::test_a_place_that_takes_no_file_is_told_before_the_work"),
    Mutation("damaged save", "not read back", RESUMABLE,
             "            load_state(aside)\n", "            pass\n",
             "pipelines/test_resumable.py::test_a_state_that_reads_back_damaged_never_replaces_a_good_one"),
    Mutation("damaged save", "the one before is not tried", RESUMABLE,
             "for path in (self.newest, self.previous):", "for path in (self.newest,):",
             "pipelines/test_resumable.py::test_a_corrupt_newest_state_is_told_and_the_one_before_resumed"),
    Mutation("damaged save", "the one before is not kept", RESUMABLE,
             "            self.newest.replace(self.previous)\n", "            pass\n",
             "pipelines/test_resumable.py::test_the_newest_comes_back_and_the_one_before_is_kept"),
    Mutation("second trainer", "not kept out", RESUMABLE,
             "self._lock.enter_context(hold(self.folder / LOCK, does, self.wait_minutes))", "pass",
             "pipelines/test_resumable.py::test_a_second_trainer_of_the_key_is_refused_until_the_first_ends"),
    Mutation("other environment", "called bit-exact", RESUMABLE,
             "self.bit_exact = bit_exact and not changed", "self.bit_exact = bit_exact",
             "pipelines/test_resumable.py::test_another_environment_resumes_warns_and_stays_recorded"),
    Mutation("divergence", "NaN is trained on", "dino/curve.py",
             "if bad := [name for name, total in totals.items() if not math.isfinite(total)]:",
             "if bad := [name for name in totals if False]:",
             f"{FAULTS}::test_a_training_that_diverges_names_its_step_and_keeps_the_last_good_save"),
    Mutation("memory", "an allocation that failed is a traceback", "pipelines/processes/shortage.py",
             "return isinstance(error, RuntimeError) and any(word in", "return False and any(word in",
             f"{FAULTS}::test_an_allocation_that_fails_is_told_without_a_traceback"),
    Mutation("MLflow away", "ends the training", TRACKING,
             "                if not self._go_on_after(error):\n                    return",
             "                raise",
             "pipelines/test_tracking.py::test_a_training_neither_fails_nor_waits_for_a_server_that_is_away"),
    Mutation("MLflow away", "waited for at the end", TRACKING,
             "self._thread.join(CLOSE_SECONDS)", "self._thread.join()",
             "pipelines/test_tracking.py::test_a_locked_database_delays_no_training"),
    Mutation("resume", "curves are logged twice", "pipelines/rows/mlflow_store.py",
             "if step not in self._logged(name) and (name, step) not in taken:", "if (name, step) not in taken:",
             "pipelines/test_tracking.py::test_resuming_finds_the_row_and_logs_no_step_twice"),
    Mutation("signals", "TERM does not save", "pipelines/processes/ending.py",
             "        self.asked = False\n        heed(self._note)", "        self.asked = False",
             "pipelines/test_ending.py::test_who_asks_saves_first"),
    Mutation("signals", "the parent's death goes unseen", "pipelines/processes/ending.py",
             "        os.kill(os.getpid(), signal.SIGUSR1)\n", "        pass\n",
             "pipelines/test_ending.py::test_the_parents_death_is_an_order"),
    # bad input
    Mutation("checkpoint", "an altered one is taken", CHECKPOINT,
             "if known != _checksum(tensors, facts):", "if False:",
             "dino/test_checkpoint.py::test_an_altered_file_is_refused_or_says_the_same"),
    Mutation("checkpoint", "a state is taken for a backbone", CHECKPOINT,
             'if facts.get("format") != BACKBONE_FORMAT:', "if False:",
             "dino/test_checkpoint.py::test_a_file_under_another_name_is_refused"),
    Mutation("weights", "a pickle may run code", "dino/weights.py",
             'map_location="cpu", weights_only=True)', 'map_location="cpu", weights_only=False)',
             "dino/test_weights.py::test_a_hostile_file_is_refused_and_runs_no_code"),
    Mutation("table", "one cut short is a shorter one", IMAGES,
             "        if file.read() != END_OF_STREAM:", "        if False:",
             "dino/test_images.py::test_a_table_cut_between_two_batches_is_no_shorter_table"),
    Mutation("table", "unsorted rows are taken", IMAGES,
             "if not all(one < next_one for one, next_one in pairwise(ids.to_pylist())):", "if False:",
             "dino/test_images.py::test_a_table_that_is_not_whole_or_not_ours_is_refused"),
    Mutation("images", "a bomb is decoded", "dino/decode.py",
             "if image.width * image.height > max_pixels:", "if False:",
             "dino/test_decode.py::test_too_many_pixels_are_refused_by_the_header_alone"),
    Mutation("images", "absurdly long ones are kept", "pipelines/data/examine.py",
             "if max(image.size) > limits.aspect * min(image.size):", "if False:",
             "pipelines/data/test_examine.py::test_absurd_images_are_left_out_with_the_reason"),
    Mutation("images", "a folder that may not be read is an empty class", "pipelines/data/folders.py",
             "    raise error\n", "    return\n",
             "pipelines/data/test_folders.py::test_a_folder_that_may_not_be_read_is_told_not_taken_for_empty"),
    Mutation("features", "not finite ones are evaluated", FEATURES,
             "if not rows_ND.isfinite().all():", "if False:", UNFITTING),
    Mutation("features", "of two trainings are compared", FEATURES,
             "if trained != untrained:", "if False:", UNFITTING),
    Mutation("features", "an image counts twice", FEATURES,
             "if len({*zip(splits, ids, strict=True)}) < len(ids):", "if False:", UNFITTING),
    Mutation("features", "of other images than the labels'", LABELS,
             "        if len(alone):\n", "        if False:\n", UNFITTING),
    Mutation("labels", "below 0", LABELS, 'if (table["label"] < 0).any():', "if False:", UNFITTING),
    Mutation("any file", "a damaged one is a traceback", "pipelines/reading.py",
             "        if of_the_system or isinstance(problem, MemoryError):\n", "        if True:\n", SPOILT),
    Mutation("params", "a doubled key: the last one counts", PARAMS,
             "if problem is None and key in seen:", "if False:",
             "pipelines/test_params.py::test_what_is_no_yaml_is_named_with_its_line"),
    Mutation("params", "anchors upon anchors", PARAMS,
             "if alias is not None and not isinstance(node, yaml.ScalarNode):", "if False:",
             "pipelines/test_params.py::test_what_is_no_yaml_is_named_with_its_line"),
    Mutation("params", "a huge file is read", PARAMS, "> MAX_BYTES:", "> 10 * MAX_BYTES**2:",
             "pipelines/test_params.py::test_a_huge_file_is_refused_unread"),
    Mutation("params", "an unknown name is let pass", PARAMS,
             'STRICT = ConfigDict(extra="forbid"', 'STRICT = ConfigDict(extra="ignore"',
             "pipelines/test_params.py::test_a_wrong_parameter_is_named_with_its_cure"),
    Mutation("params", "yes is 1", PARAMS,
             "wrong = isinstance(content, bool) and not isinstance(found, bool)", "wrong = False",
             "pipelines/test_params.py::test_a_wrong_parameter_is_named_with_its_cure"),
]  # fmt: skip

if __name__ == "__main__":
    print(table(UNGUARDED))
