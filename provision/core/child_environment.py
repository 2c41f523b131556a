"""Selects the settings of pip, uv and Python that a child process inherits from this machine.

The bootstrap imports this module, so it uses the standard library only and no syntax newer than Python 3.6.
"""

import ast
import os
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

# The policy for one setting.
# kept: the setting names a source of packages or the network path to it, so the child inherits the setting.
# reported: the setting would change the installed packages or their folder, or break the interpreter. It is dropped
# with a message.
# ignored: the setting has no meaning here. It is dropped without a message.
KEPT, REPORTED, IGNORED = "kept", "reported", "ignored"

# The long options of pip. Each is a key of pip.conf and, as PIP_NAME, a variable.
# (source: `pip install --help` of pip 20 to 26)
_PIP_TABLE = {
    KEPT: "index-url pypi-url extra-index-url find-links no-index cert client-cert proxy no-proxy-env trusted-host "
    "timeout default-timeout retries resume-retries cache-dir no-cache-dir keyring-provider use-feature use-deprecated",
    REPORTED: "user target prefix root constraint build-constraint requirement requirements-from-script group editable "
    "no-binary only-binary prefer-binary pre all-releases only-final uploaded-prior-to dry-run python python-version "
    "platform implementation abi only-deps only-dependencies",
    IGNORED: "help debug verbose version quiet no-input disable-pip-version-check no-python-version-warning no-color "
    "progress-bar root-user-action no-warn-conflicts no-warn-script-location no-clean exists-action report no-user "
    "check-build-dependencies refresh-package require-virtualenv require-venv ignore-requires-python require-hashes "
    "no-require-hashes no-deps no-dependencies upgrade upgrade-strategy force-reinstall ignore-installed src source "
    "source-dir source-directory compile no-compile break-system-packages isolated config-settings global-option "
    "no-build-isolation use-pep517 no-use-pep517 log log-file local-log",
}
# PIP_CONFIG_FILE names pip's configuration file. It is pip's only variable without a command-line option.
_PIP_TABLE[KEPT] += " config-file"

# The variables of uv, without the prefix UV_.
# (source: `uv help pip install`, `uv help venv`, and the list of variables in uv's documentation)
_UV_TABLE = {
    KEPT: "INDEX DEFAULT_INDEX INDEX_URL EXTRA_INDEX_URL FIND_LINKS NO_INDEX INSECURE_HOST KEYRING_PROVIDER "
    "SYSTEM_CERTS NATIVE_TLS HTTP_TIMEOUT REQUEST_TIMEOUT HTTP_CONNECT_TIMEOUT HTTP_RETRIES CACHE_DIR CREDENTIALS_DIR "
    "S3_ENDPOINT_URL GCS_ENDPOINT_URL AZURE_ENDPOINT_URL "
    "CONFIG_FILE NO_SYSTEM_CONFIG CONCURRENT_DOWNLOADS CONCURRENT_INSTALLS CONCURRENT_BUILDS LOCK_TIMEOUT",
    REPORTED: "EXCLUDE EXCLUDE_NEWER TORCH_BACKEND CONSTRAINT OVERRIDE BUILD_CONSTRAINT NO_BINARY NO_BINARY_PACKAGE "
    "PRERELEASE PRERELEASE_PACKAGE RESOLUTION NO_VERIFY_HASHES NO_CACHE OFFLINE PYTHON PROJECT LINK_MODE",
    IGNORED: "COMPILE_BYTECODE NO_BUILD_ISOLATION NO_CONFIG NO_EDITABLE NO_PROGRESS NO_PROJECT NO_SOURCES NO_BUILD "
    "NO_SOURCES_PACKAGE NO_BUILD_PACKAGE FORK_STRATEGY INDEX_STRATEGY REQUIRE_HASHES PYTHON_DOWNLOADS "
    "PYTHON_PREFERENCE MANAGED_PYTHON NO_MANAGED_PYTHON SYSTEM_PYTHON BREAK_SYSTEM_PACKAGES WORKING_DIR "
    "WORKING_DIRECTORY VENV_CLEAR VENV_SEED VENV_RELOCATABLE INSECURE_NO_ZIP_VALIDATION SKIP_WHEEL_FILENAME_CHECK "
    "NO_INSTALLER_METADATA PROJECT_ENVIRONMENT CUSTOM_COMPILE_COMMAND PYTHON_INSTALL_BIN PYTHON_INSTALL_DIR "
    "PYTHON_INSTALL_REGISTRY",
}

# The top-level keys of uv.toml, and the keys that only its [pip] table has.
# (source: uv's parser, whose error message for an unknown key lists the valid keys)
_UV_TOML_TABLE = {
    KEPT: "index index-url extra-index-url find-links no-index keyring-provider allow-insecure-host system-certs "
    "native-tls http-proxy https-proxy no-proxy concurrent-downloads concurrent-builds concurrent-installs",
    REPORTED: "exclude-newer exclude-newer-package torch-backend override-dependencies exclude-dependencies "
    "constraint-dependencies build-constraint-dependencies no-binary no-binary-package only-binary resolution "
    "prerelease prerelease-package offline no-cache target prefix python python-version python-platform "
    "required-version",
    IGNORED: "no-build no-build-package fork-strategy index-strategy link-mode reinstall reinstall-package upgrade "
    "upgrade-package dependency-metadata system break-system-packages no-deps require-hashes verify-hashes "
    "minimum-libc-version cache-dir preview preview-features python-preference python-downloads config-settings "
    "config-settings-package no-build-isolation require-build-hashes no-build-isolation-package "
    "extra-build-dependencies extra-build-variables compile-bytecode no-sources no-sources-package "
    "python-install-mirror pypy-install-mirror graalpy-install-mirror pyodide-install-mirror "
    "python-downloads-json-url publish-url trusted-publishing check-url add-bounds audit pip cache-keys environments "
    "required-environments conflicts workspace sources managed package default-groups dependency-groups "
    "dev-dependencies build-backend strict extra all-extras no-extra group allow-empty-requirements output-file "
    "no-strip-extras no-strip-markers no-annotate no-header custom-compile-command generate-hashes universal "
    "no-emit-package emit-index-url emit-find-links emit-build-options emit-marker-expression emit-index-annotation "
    "annotation-style",
}

# The variables of Python, without the prefix PYTHON. (source: `python3 --help-env` of Python 3.10 to 3.14)
_PYTHON_TABLE = {
    KEPT: "UTF8 IOENCODING COERCECLOCALE UNBUFFERED HASHSEED PYCACHEPREFIX FAULTHANDLER LEGACYWINDOWSFSENCODING "
    "LEGACYWINDOWSSTDIO",
    REPORTED: "PATH HOME",
    IGNORED: "SAFEPATH PLATLIBDIR USERBASE STARTUP WARNINGS OPTIMIZE EXECUTABLE CASEOK NOUSERSITE "
    "DONTWRITEBYTECODE DEBUG INSPECT VERBOSE BREAKPOINT ASYNCIODEBUG DEVMODE DUMPREFS DUMPREFSFILE "
    "INTMAXSTRDIGITS MALLOC MALLOCSTATS NODEBUGRANGES PERFSUPPORT PROFILEIMPORTTIME TRACEMALLOC WARNDEFAULTENCODING "
    "THREADDEBUG _COLORS _BASIC_REPL _COLORIZE _CPU_COUNT _DISABLE_REMOTE_DEBUG _FROZEN_MODULES _GIL _HISTORY "
    "_PERF_JIT_SUPPORT _PRESITE _TLBC _CONTEXT_AWARE_WARNINGS _THREAD_INHERIT_CONTEXT _JIT",
}


def _by_name(table: "dict[str, str]") -> "dict[str, str]":
    return {name: group for group, names in table.items() for name in names.split()}


PIP, UV, UV_TOML, PYTHON = (_by_name(table) for table in (_PIP_TABLE, _UV_TABLE, _UV_TOML_TABLE, _PYTHON_TABLE))

# A credential of a named index, such as UV_INDEX_NAME_USERNAME. (source: uv's documentation of indexes)
_CREDENTIAL = re.compile(r"UV_INDEX_\w+_(USERNAME|PASSWORD)")


def policy(variable: str) -> str:
    """Return the policy for an environment variable: KEPT, REPORTED or IGNORED.

    A child process inherits a KEPT variable. A REPORTED variable is dropped with a message, an IGNORED one without a
    message. A variable that does not belong to pip, uv or Python is KEPT.
    """
    if variable.startswith("PIP_"):
        return PIP.get(variable[len("PIP_") :].lower().replace("_", "-"), IGNORED)
    if variable.startswith("UV_"):
        return KEPT if _CREDENTIAL.match(variable) else UV.get(variable[len("UV_") :], IGNORED)
    if variable.startswith("PYTHON"):
        return PYTHON.get(variable[len("PYTHON") :], IGNORED)
    return KEPT


def child(environ: "Mapping[str, str]") -> "dict[str, str]":
    """Return the environment variables for a child process that runs python, pip or uv.

    These are the variables of `environ` whose policy is KEPT. PYTHONNOUSERSITE is added, so that packages in the user's
    own site-packages are not imported.
    """
    kept = {name: value for name, value in environ.items() if policy(name) == KEPT}
    kept["PYTHONNOUSERSITE"] = "1"
    return kept


def dropped(environ: "Mapping[str, str]") -> "list[str]":
    """Return the sorted names of the variables that are set, but dropped with a message (policy REPORTED)."""
    return sorted(name for name, value in environ.items() if value and policy(name) == REPORTED)


def parse_pip_config(listing: str) -> "dict[str, list[str]]":
    """Return {option: values} from the output of `pip config list`.

    As in pip, an environment variable overrides the configuration file. In the file, the section `install` overrides
    the section `global`.

    Args:
        listing: lines such as `global.index-url='https://…'` or `:env:.find-links='/wheels'`.
    """
    ranks = {"global": 0, "install": 1, ":env:": 2}
    merged = {}  # type: dict[str, tuple[int, list[str]]]
    for line in listing.splitlines():
        match = re.match(r"(global|install|:env:)\.([\w-]+)=(.+)$", line)
        if not match:
            continue
        section, option, quoted = match.groups()
        try:
            value = str(ast.literal_eval(quoted))
        except (ValueError, SyntaxError):
            value = quoted
        if option not in merged or ranks[section] >= merged[option][0]:
            merged[option] = (ranks[section], value.split())
    return {option: values for option, (_, values) in merged.items() if values}


def for_pip(environ: "Mapping[str, str]", settings: "Mapping[str, list[str]]") -> "dict[str, str]":
    """Return the environment variables for `pip install`.

    With them pip reads no configuration file. Of `settings`, the options with the policy KEPT apply.

    Args:
        environ: the environment variables of this process.
        settings: {option: values}, as `parse_pip_config` returns them.
    """
    plain = {name: value for name, value in child(environ).items() if not name.startswith("PIP_")}
    for option, values in settings.items():
        if PIP.get(option) == KEPT and option != "config-file":
            plain["PIP_" + option.upper().replace("-", "_")] = " ".join(values)
    plain["PIP_CONFIG_FILE"] = os.devnull
    return plain


def for_pip_config(environ: "Mapping[str, str]") -> "dict[str, str]":
    """Return the environment variables for `pip config list`, so that no setting suppresses or redirects the output."""
    return {**child(environ), "PIP_QUIET": "0", "PIP_VERBOSE": "0", "PIP_LOG": os.devnull}
