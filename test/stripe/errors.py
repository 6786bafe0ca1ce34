"""Errors of the API, with the bodies that Stripe sends.

"saved" says whether the answer is kept under an idempotency key: what is
refused before the endpoint begins to execute is not.
"""


class ApiError(Exception):
    def __init__(self, status, kind, message, saved=True, headers=(), **fields):
        super().__init__(message)
        self.status = status
        self.saved = saved
        self.headers = list(headers)
        self.body = {"error": error_body(kind, message, **fields)}


def error_body(kind, message, **fields):
    body = {name: value for name, value in fields.items() if value is not None}
    if "code" in body:
        body["doc_url"] = "https://stripe.com/docs/error-codes/" + body["code"].replace("_", "-")
    body["message"] = message
    body["type"] = kind
    return dict(sorted(body.items()))


def invalid(message, param=None, code=None, saved=False, status=400):
    """Parameters that were refused: nothing began, nothing is saved."""
    return ApiError(status, "invalid_request_error", message, saved=saved, param=param, code=code)


def refused(message, code=None, **fields):
    """An endpoint that began and can't go on in this state: saved."""
    return ApiError(400, "invalid_request_error", message, code=code, **fields)


def missing_object(name, identifier, param="id"):
    """No such object: 404 where the path names it, 400 where a parameter does.

    Finding out is execution, so it is saved.
    """
    return ApiError(404 if param == "id" else 400, "invalid_request_error",
                    f"No such {name}: '{identifier}'", code="resource_missing", param=param)


def unrecognized(method, path):
    return invalid(f"Unrecognized request URL ({method}: {path}). Please see https://stripe.com/docs "
                   "or we can help at https://support.stripe.com/.", status=404)


def no_api_key():
    return ApiError(401, "invalid_request_error",
                    "You did not provide an API key. You need to provide your API key in the "
                    "Authorization header, using Bearer auth (e.g. 'Authorization: Bearer "
                    "YOUR_SECRET_KEY'). See https://stripe.com/docs/api#authentication for details, "
                    "or we can help at https://support.stripe.com/.",
                    saved=False, headers=[("WWW-Authenticate", 'Bearer realm="Stripe"')])


def masked(key):
    return key[:8] + "*" * max(0, len(key) - 12) + key[-4:] if len(key) > 12 else "*" * len(key)


def invalid_api_key(key):
    return ApiError(401, "invalid_request_error", f"Invalid API Key provided: {masked(key)}",
                    saved=False, headers=[("WWW-Authenticate", 'Bearer realm="Stripe"')])


def expired_api_key(key):
    return ApiError(401, "invalid_request_error", f"Expired API Key provided: {masked(key)}",
                    saved=False, code="api_key_expired")


def publishable_key():
    return ApiError(403, "invalid_request_error",
                    "This API call cannot be made with a publishable API key. Please use a secret "
                    "API key. You can find a list of your API keys at "
                    "https://dashboard.stripe.com/account/apikeys.",
                    saved=False, code="secret_key_required")


def missing_permission(key, account, permission):
    return ApiError(403, "invalid_request_error",
                    f"The provided key '{masked(key)}' does not have the required permissions for "
                    f"this endpoint on account '{account}'. Having the '{permission}' permission "
                    "would allow this request to continue.", saved=False)


def no_access(key, account):
    return ApiError(403, "invalid_request_error",
                    f"The provided key '{masked(key)}' does not have access to account '{account}' "
                    "(or that account does not exist). Application access may have been revoked.",
                    saved=False, code="account_invalid")


def key_in_use(key):
    return ApiError(409, "invalid_request_error",
                    "There is currently another in-progress request using this Idempotent Key (that "
                    "probably means you submitted twice, and the other request is still going "
                    f"through): {key}. Please try again later.",
                    saved=False, code="idempotency_key_in_use")


def other_parameters(key):
    return ApiError(400, "idempotency_error",
                    "Keys for idempotent requests can only be used with the same parameters they "
                    f"were first used with. Try using a key other than '{key}' if you meant to "
                    "execute a different request.", saved=False)


def other_endpoint(key, path, first_path):
    return ApiError(400, "idempotency_error",
                    "Keys for idempotent requests can only be used for the same endpoint they were "
                    f"first used for ('{path}' vs '{first_path}'). Try using a key other than "
                    f"'{key}' if you meant to execute a different request.", saved=False)


def key_too_long(length, limit):
    return ApiError(400, "invalid_request_error",
                    f"Idempotency-Key must be at most {limit} characters long, and this one has "
                    f"{length}.", saved=False)
