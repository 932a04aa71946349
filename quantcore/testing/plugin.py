"""pytest plugin of the conformance kit: its options, its summary, and failing where nothing ran.

Not loaded by itself: ``pytest -p quantcore.testing.plugin --pyargs quantcore.testing.conformance
--quantcore-backend NAME``.
"""

import pytest

from quantcore.testing import report as entries


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the kit's options."""
    group = parser.getgroup("quantcore", "conformance of quantcore backends")
    group.addoption("--quantcore-backend", metavar="NAME", help="the backend that the conformance kit tests")
    group.addoption(
        "--quantcore-library",
        metavar="NAME",
        help="the array library to test it on (for backends that take any; default: array_api_strict or numpy)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the collector of what the tests note."""
    config.pluginmanager.register(_Collector(config), "quantcore-conformance")


class _Collector:
    """Gathers the entries of the kit's tests, and judges the run by them."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._properties: list[tuple[str, object]] = []
        self._kit: set[str] = set()
        self._judged = 0

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Refuse to run the kit without a backend."""
        kit = [item for item in session.items if isinstance(item, pytest.Function) and "bench" in item.fixturenames]
        self._kit = {item.nodeid for item in kit}
        if self._config.getoption("--quantcore-backend") is None and any(map(_is_default, kit)):
            raise pytest.UsageError("say which backend to test: --quantcore-backend NAME")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep what a test noted."""
        if report.when == "call" or report.failed:
            self._properties.extend(report.user_properties)
            self._judged += report.nodeid in self._kit and not report.skipped

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Fail a run that proves nothing."""
        if session.exitstatus == pytest.ExitCode.OK and self._why_nothing_is_proved():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Show what ran, what was refused and why, and the worst errors."""
        found = entries.tally(self._properties)
        problems = self._why_nothing_is_proved()
        if not found and not problems:
            return
        terminalreporter.section("quantcore conformance")
        for line in entries.lines(found):
            terminalreporter.write_line(line)
        for problem in problems:
            terminalreporter.write_line(f"FAILED: {problem}", red=True)

    def _why_nothing_is_proved(self) -> list[str]:
        found = entries.tally(self._properties)
        if self._kit and found and not self._judged:
            return ["every test of the kit was skipped"]
        return entries.failures(found)


def _is_default(item: pytest.Function) -> bool:
    return item.cls is not None and item.cls.__module__ == "quantcore.testing.conformance"
