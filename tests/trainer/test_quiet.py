"""What libraries print about themselves at every start is left out, and nothing else of theirs."""

import logging

import pytest

from trainer.quiet import NOISE, leave_out_noise


@pytest.mark.parametrize("name", NOISE)
def test_a_known_message_is_left_out_and_others_of_its_logger_are_not(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger(name)
    before = list(logger.filters)
    try:
        leave_out_noise()
        logger.warning(f"%s {NOISE[name]} %s", "this", "that")
        logger.warning("something else")
    finally:
        logger.filters[:] = before
    assert [record.getMessage() for record in caplog.records if record.name == name] == ["something else"]
