"""What happens to a request between its arrival and its answer.

    who asks (401, 403)  ->  Stripe-Version, Stripe-Account (400, 403)
    ->  its key (replayed, 409, 400)  ->  its parameters (400, not saved)
    ->  its effect  ->  its answer, saved under its key
"""

import base64
import json
import re
import sys
import traceback

import billing      # noqa: F401 (registers routes)
import connect      # noqa: F401
import errors
import events       # noqa: F401
import faults
import params
import payments     # noqa: F401
import routes
import v2           # noqa: F401
from errors import ApiError
from store import Call

API_KEY = re.compile(r"(sk|rk|pk|sk_org)_(test|live)_[A-Za-z0-9_]{1,250}\Z")
VERSION = re.compile(r"\d{4}-\d{2}-\d{2}(\.[a-z0-9_]+)?(; *[a-z0-9_]+=v\d+)*\Z")
ACCOUNT = re.compile(r"acct_[A-Za-z0-9_]{1,250}\Z")


class Answer:
    def __init__(self, status, body, headers=(), content_type="application/json"):
        self.status = status
        self.body = body                # bytes
        self.headers = list(headers)
        self.content_type = content_type

    def with_headers(self, headers):
        return Answer(self.status, self.body, self.headers + list(headers), self.content_type)


def json_answer(status, value, headers=()):
    return Answer(status, json.dumps(value, indent=2, ensure_ascii=False).encode("utf-8") + b"\n",
                  headers)


def error_answer(error):
    return json_answer(error.status, error.body, error.headers)


def facts(request, listener):
    """What a fault can be matched by."""
    return {"method": request.method, "path": request.path,
            "key": request.header("Idempotency-Key"),
            "account": request.header("Stripe-Context") or request.header("Stripe-Account"),
            "livemode": "_live_" in (bearer(request) or ""), "reused": request.number > 1,
            "body": request.body.decode("utf-8", "replace"), "listener": listener}


def bearer(request):
    """The API key: Bearer, or the user name of Basic."""
    scheme, _, value = (request.header("Authorization") or "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value).decode("utf-8").partition(":")[0]
        except (ValueError, UnicodeDecodeError):
            return None
    return None


class Api:
    def __init__(self, world):
        self.world = world

    def authenticate(self, request):
        """(key, account, livemode, permissions or None for all) of a request."""
        key = bearer(request)
        if not key:
            raise errors.no_api_key()
        known = self.world.api_keys.get(key, {})
        match = API_KEY.match(key)
        if not match or known.get("invalid"):
            raise errors.invalid_api_key(key)
        if known.get("expired"):
            raise errors.expired_api_key(key)
        if match[1] == "pk":
            raise errors.publishable_key()
        account = known.get("account", self.world.platform)
        direct, context = request.header("Stripe-Account"), request.header("Stripe-Context")
        if direct and context:
            raise errors.invalid("Only one of Stripe-Account and Stripe-Context can be sent.")
        if match[1] == "sk_org" and not context:
            raise errors.invalid("A Stripe-Context header is needed with an organization's API key.")
        asked = direct or context
        if asked:
            for part in asked.split("/") if context else [asked]:
                if not ACCOUNT.match(part) or not self.world.accounts.get(part, True):
                    raise errors.no_access(key, asked)
                account = part
        return key, account, match[2] == "live", known.get("permissions")

    def version(self, request, api):
        version = request.header("Stripe-Version")
        if version is None:
            if api == "v2":
                raise errors.invalid("A Stripe-Version header is required for requests to API v2.")
            return self.world.settings["api_version"]
        if not VERSION.match(version):
            raise errors.invalid(f"Invalid Stripe API version: {version}")
        return version

    def parameters(self, request, api):
        """The parameters of a request, parsed but not checked."""
        if request.method == "GET" or (api == "v1" and request.method == "DELETE"):
            return params.decode_form(request.query)
        kind = (request.header("Content-Type") or "").partition(";")[0].strip().lower()
        if api == "v1":
            if request.body and kind != "application/x-www-form-urlencoded":
                raise errors.invalid("Invalid request: API v1 takes its parameters as "
                                     "application/x-www-form-urlencoded, and this Content-Type is "
                                     f"'{kind}'.")
            try:
                text = request.body.decode("ascii")
            except UnicodeDecodeError:
                raise errors.invalid("Invalid request: the body isn't URL-encoded") from None
            return params.decode_form(text)
        if not request.body:
            return {}
        if kind != "application/json":
            raise errors.invalid(f"API v2 takes application/json, and this Content-Type is '{kind}'.")
        try:
            value = json.loads(request.body.decode("utf-8"))
        except ValueError:
            raise errors.invalid("Invalid request: the body is no JSON") from None
        if not isinstance(value, dict):
            raise errors.invalid("Invalid request: the body is no JSON object")
        return value

    def answer(self, request, arrival, request_id, hang, known_facts):
        """(answer, notes) of the API; no answer where the request is dropped.

        hang(fault) holds a request while its key is in use.  What goes wrong
        in the fake itself is told to the client as well as to the tester, and
        leaves no key in use.
        """
        world = self.world
        api = "v2" if request.path.startswith("/v2/") else "v1"
        key = request.header("Idempotency-Key") or None
        if not (request.method == "POST" or (api == "v2" and request.method == "DELETE")):
            key = None                  # without effect elsewhere
        notes = {"replayed": False, "request_id": request_id}
        common = [("Request-Id", request_id)]
        if key is not None:
            common.append(("Idempotency-Key", key))
        entry = scope = None
        try:
            with world.lock:
                if world.epoch != arrival["_epoch"]:
                    return None, notes
                api_key, account, livemode, permissions = self.authenticate(request)
                notes.update(account=account, livemode=livemode)
                version = self.version(request, api)
                notes.update(version=version)
                common.append(("Stripe-Version", version))
                if account != world.platform:
                    common.append(("Stripe-Account", account))
                found, ids = routes.find(request.method, request.path)
                self.permit(found, permissions, api_key, account)
                given = self.parameters(request, api)
                if key is not None:
                    scope = (account, livemode)
                    entry = world.keys.begin(api, scope, key, request_id, request, given,
                                             world.clock.now())
                    if entry.saved is not None and not entry.running:
                        notes["replayed"] = True
                        return self.replay(entry, common), notes
                    if entry.succeeded and not entry.running:
                        notes["replayed"] = True
                        return json_answer(200, entry.succeeded(), common), notes
                    common.append(("Original-Request", entry.request_id))
                call = Call(world, account, livemode, version, request_id, key,
                            arrival["arrival"])
                by_table = api == "v1" or request.method == "GET"
                creates = request.method == "POST" and "{" not in found.path
                checked = params.accept(given, found.accepts, creates) if by_table else given
                fault = world.faults.choose(faults.EXECUTION, known_facts)
            if fault and fault.what == "hang_in_use":
                notes["fault"] = fault.number
                if not hang(fault):
                    with world.lock:
                        self.abandon(api, scope, entry)
                    return None, notes
                fault = None
            with world.lock:
                if world.epoch != arrival["_epoch"]:
                    return None, notes
                call.now = world.clock.seconds()
                answer, saved = self.execute(call, found, checked, ids, fault, notes, entry, api)
                if entry is not None:
                    entry.running = False
                    if api == "v1":
                        if saved:
                            entry.saved = (answer.status, answer.body, answer.headers)
                        else:
                            world.keys.forget(api, scope, entry)
                world.notify()
            return answer.with_headers(common), notes
        except ApiError as error:
            with world.lock:
                self.abandon(api, scope, entry)
            return error_answer(error).with_headers(self.original(error, key, request_id, common)), notes
        except Exception:
            with world.lock:
                self.abandon(api, scope, entry)
                world.internal_errors.append(traceback.format_exc())
            traceback.print_exc(file=sys.stderr)
            return json_answer(500, {"error": {"type": "fake_stripe_bug",
                                               "message": traceback.format_exc()}}, common), notes

    @staticmethod
    def original(error, key, request_id, common):
        names = {name for name, _ in common} | {name for name, _ in error.headers}
        if key is not None and "Original-Request" not in names:
            return common + [("Original-Request", request_id)]
        return common

    @staticmethod
    def replay(entry, common):
        status, body, headers = entry.saved
        return Answer(status, body, headers).with_headers(
            [*common, ("Original-Request", entry.request_id), ("Idempotent-Replayed", "true")])

    def permit(self, found, permissions, api_key, account):
        if permissions is None or found.permission in permissions:
            return
        if found.permission.endswith("_read") and found.permission[:-4] + "write" in permissions:
            return
        raise errors.missing_permission(api_key, account, found.permission)

    def abandon(self, api, scope, entry):
        if entry is not None and entry.running:
            self.world.keys.forget(api, scope, entry)
            self.world.notify()

    def execute(self, call, found, given, ids, fault, notes, entry, api):
        """(answer, saved?) of an endpoint, or of a fault in its stead."""
        error = None
        if fault is not None:
            notes["fault"] = fault.number
            error = with_fault_headers(faults.api_error(fault, call.key), fault)
            if not fault.get("effect"):
                return error_answer(error), error.saved
        try:
            made = found.function(call, given, *ids)
            if error is None:
                shown = call.shown(made, given.get("expand", ()) if api == "v1" else ())
                if api == "v2" and entry is not None:
                    entry.succeeded = lambda: call.shown(made)
                return json_answer(200, shown, [("Stripe-Should-Retry", "false")]), True
        except ApiError as refused:
            if error is None:
                error = refused
                if error.status < 409:
                    error.headers.append(("Stripe-Should-Retry", "false"))
        return error_answer(error), error.saved


def with_fault_headers(error, fault):
    """The headers that a fault asks for."""
    error.headers += extra_headers(fault)
    return error


def extra_headers(fault):
    headers = [(name, str(value)) for name, value in fault.get("headers", {}).items()]
    if fault.get("should_retry") is not None:
        headers.append(("Stripe-Should-Retry", "true" if fault.get("should_retry") else "false"))
    return headers
