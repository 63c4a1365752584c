"""What boto3 raises, as members of the taxonomy: the one place that knows its exceptions and the stores' error codes.

Codes are those of AWS, with those of other servers where these have their own (MinIO's begin with X). A request with no
body in its answer (HEAD) has a number for a code. The codes and texts were read off AWS's list of error responses,
and off SeaweedFS and moto where these can be made to fail so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from botocore import exceptions as boto

from backupcore.errors import (
    AccessDenied,
    BackupError,
    ConfigError,
    IntegrityError,
    SourceNotFound,
    TargetFull,
    TargetUnavailable,
    UnsupportedOperation,
)

__all__ = ["NoStore", "code", "is_absent", "is_refused", "is_unknown_to_server", "redact", "require_store", "translate"]

_REDIRECTS = range(300, 400)
_REFUSED = {"AccessDenied", "Forbidden", "403", "ObjectLocked", "WORMProtected", "XMinioObjectLocked"}
"""Codes for what this key, which is known, may not do."""
_NOT_CHANGED = 304


class NoStore(Exception):
    """What answers at the endpoint is no S3 store, or sends elsewhere. Its text says which, and what it said."""


def require_store(status: int, headers: Mapping[str, str], body: object) -> None:
    """Look at an answer before botocore does, which follows a redirection for ever and believes any page: NoStore."""
    if status in _REDIRECTS and status != _NOT_CHANGED:
        where = headers.get("location", "")
        raise NoStore(f"it sends elsewhere (HTTP {status}{f': {where}' if where else ''})")
    if status < _REDIRECTS.start and isinstance(body, bytes) and _PAGE.match(body):
        raise NoStore(f"a web page came (HTTP {status}), and no answer of a store")


@dataclass(frozen=True, slots=True)
class Rule:
    """`error` for these error codes of a store, or for these exceptions of boto3."""

    error: type[BackupError]
    codes: frozenset[str]
    hint: str = ""
    exceptions: tuple[type[Exception], ...] = ()


def _codes(text: str) -> frozenset[str]:
    return frozenset(text.split())


RULES = (
    Rule(
        ConfigError,
        _codes("NoSuchBucket InvalidBucketName"),
        "Create the bucket, or mend the options bucket and endpoint_url of this datastore.",
    ),
    Rule(
        ConfigError,
        _codes(
            "PermanentRedirect AuthorizationHeaderMalformed IllegalLocationConstraintException TemporaryRedirect"
            " BucketRegionError 301"
        ),
        "The bucket lies in another region: set the options region and endpoint_url of this datastore.",
    ),
    Rule(
        AccessDenied,
        _codes("RequestTimeTooSkewed RequestExpired"),
        "The clock of this host, or of the server, is off: set it (chrony, systemd-timesyncd), then run it again.",
    ),
    Rule(
        AccessDenied,
        _codes(
            "InvalidAccessKeyId SignatureDoesNotMatch InvalidToken ExpiredToken ExpiredTokenException"
            " TokenRefreshRequired InvalidSecurity InvalidClientTokenId UnrecognizedClientException"
        ),
        "Check the access key and its secret: the option credentials_file or profile of this datastore.",
    ),
    Rule(
        AccessDenied,
        frozenset(),
        "Name a profile or a credentials_file in the options of this datastore.",
        (boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError),
    ),
    Rule(
        AccessDenied,
        _codes(
            "AccessDenied AllAccessDisabled AccountProblem NotSignedUp InvalidPayer CrossLocationLoggingProhibited"
            " ObjectLocked WORMProtected XMinioObjectLocked KMS.AccessDeniedException KMS.DisabledException"
            " Forbidden 401 403"
        ),
        "Check what the access key may do here; the README of backupcore-s3 lists what is needed.",
    ),
    Rule(
        TargetFull,
        _codes(
            "QuotaExceeded XMinioStorageFull XMinioAdminBucketQuotaExceeded InsufficientStorage StorageFull"
            " InsufficientCapacity NoSpace BucketQuotaExceeded AccountQuotaExceeded 507"
        ),
        "Make room there (older backups, unfinished uploads) or raise the quota, then run it again.",
    ),
    Rule(
        ConfigError,
        _codes(
            "InvalidStorageClass InvalidEncryptionAlgorithmError KMS.NotFoundException KMS.InvalidStateException"
            " ServerSideEncryptionConfigurationNotFoundError"
        ),
        "Check the options storage_class, sse and sse_kms_key_id of this datastore.",
    ),
    Rule(
        ConfigError,
        frozenset(),
        "Check the options of this datastore.",
        (
            boto.ParamValidationError,
            boto.ProfileNotFound,
            boto.InvalidRegionError,
            boto.ConfigParseError,
            boto.UnknownClientMethodError,
        ),
    ),
    Rule(
        TargetUnavailable,  # no damage: all of it is there, and comes back
        _codes("InvalidObjectState"),
        "The object lies in an archive: have the store restore it first (aws s3api restore-object), then run it again.",
    ),
    Rule(UnsupportedOperation, _codes("NotImplemented MethodNotAllowed EntityTooLarge 405 501")),
    Rule(
        UnsupportedOperation,
        _codes("413"),
        "A web server in front of the store takes no request of that size: have it take 64 MiB at least.",
    ),
    Rule(
        ConfigError,
        _codes("407"),
        "A proxy wants a login: check the proxy settings of this host (HTTPS_PROXY), or the option endpoint_url.",
    ),
    Rule(AccessDenied, _codes("402"), "The provider wants to be paid, or the account is suspended: ask there."),
    Rule(IntegrityError, _codes("InvalidRange 416")),
    Rule(SourceNotFound, _codes("NoSuchKey NoSuchVersion 404")),
    Rule(
        TargetUnavailable,
        frozenset(),
        "Its certificate cannot be trusted: name the authority that signed it by the option ca_file.",
        (boto.SSLError,),
    ),
    Rule(
        TargetUnavailable,
        _codes(
            "SlowDown ServiceUnavailable Throttling ThrottlingException RequestLimitExceeded TooManyRequests 429 503"
        ),
        "The store asks for fewer requests: lower the option concurrency, or try again later.",
    ),
    Rule(
        TargetUnavailable,
        _codes("NoSuchUpload"),
        "The upload was aborted by somebody else, or by a lifecycle rule that is too short. Run it again.",
    ),
    Rule(
        TargetUnavailable,
        frozenset(),
        "Is it up, and reachable from here? Check the option endpoint_url.",
        (
            boto.EndpointConnectionError,
            boto.ConnectionError,
            boto.HTTPClientError,
            boto.IncompleteReadError,
            boto.ResponseStreamingError,
        ),
    ),
)

_UNTRUSTED = "CERTIFICATE_VERIFY_FAILED"  # OpenSSL's name for a certificate that cannot be trusted

_UNKNOWN = _codes("NotImplemented InvalidRequest InvalidArgument UnsupportedArgument MethodNotAllowed 400 501")
_PAGE = re.compile(rb"\s*<(!doctype\s+html|html)\b", re.IGNORECASE)
_IN_URL = re.compile(r"(?<=//)[^/@\s]*@")


def redact(text: str) -> str:
    """`text` without the user and password of any URL in it."""
    return _IN_URL.sub("***@", text)


def code(error: BaseException | None) -> str:
    """The store's error code behind an error that `translate` made, or of boto3's own; "" if there is none."""
    found = error.__cause__ if isinstance(error, BackupError) else error
    if not isinstance(found, boto.ClientError):
        return ""
    # A web server in front of the store gives none.
    status = found.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return str(found.response.get("Error", {}).get("Code") or status or "")


def is_absent(error: BaseException) -> bool:
    """True if the store says that this object (not its bucket) does not exist."""
    return code(error) in {"NoSuchKey", "404"}


def is_refused(error: BaseException) -> bool:
    """True if a policy or a lock refuses what was asked for; not where the store does not know the key."""
    return code(error) in _REFUSED


def is_unknown_to_server(error: BaseException) -> bool:
    """True if this server may not know what was asked for: an older or a smaller one than AWS."""
    return code(error) in _UNKNOWN


def translate(error: Exception, what: str) -> BackupError:
    """The error for what boto3 raised; `what` says what was being done, and where."""
    said = code(error)
    if isinstance(error, NoStore):
        return ConfigError(
            redact(f"{what}: {error}"),
            "Check the option endpoint_url: the address of the store's S3 service itself, not of its console, with "
            "http:// or https:// as it speaks, and region.",
        )
    if isinstance(error, boto.SSLError) and _UNTRUSTED not in str(error):
        return ConfigError(
            redact(f"{what}: {' '.join(str(error).split()):.500}"),
            "Does it speak TLS at all? If not, the option endpoint_url begins with http://.",
        )
    if isinstance(error, boto.ClientError):
        status = str(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") or "")
        reason = str(error.response.get("Error", {}).get("Message") or "the store refused")
        reason = f"{reason} ({said})" if said and said != status and said not in reason else reason
        reason = f"{reason} (HTTP {status})" if status and status not in reason else reason
    else:
        reason = str(error) or type(error).__name__
    message = redact(f"{what}: {' '.join(reason.split()):.500}")
    for rule in RULES:
        if said in rule.codes or isinstance(error, rule.exceptions):
            return rule.error(message, rule.hint)
    return TargetUnavailable(message)
