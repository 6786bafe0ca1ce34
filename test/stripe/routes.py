"""Which function answers which request, and what it accepts."""

import re

import errors
import params
import search

ROUTES = []


class Route:
    def __init__(self, method, path, resource, accepts, function):
        self.method = method
        self.path = path
        self.pattern = re.compile(re.sub(r"\{\w+\}", r"([^/]+)", path) + r"\Z")
        self.permission = f"rak_{resource}_{'read' if method == 'GET' else 'write'}"
        self.accepts = accepts
        self.function = function


def route(method, path, resource, accepts=None):
    def register(function):
        ROUTES.append(Route(method, path, resource, accepts or {}, function))
        return function
    return register


def find(method, path):
    """The route and the ids in the path."""
    for candidate in ROUTES:
        match = candidate.pattern.match(path)
        if match and candidate.method == method:
            return candidate, [params.unquote(part) for part in match.groups()]
    raise errors.unrecognized(method, path)


LIST = {"limit": "int", "starting_after": "str", "ending_before": "str", "created": "any"}


def readable(name, base, filters=(), resource=None):
    """Retrieve, list and, where Stripe has it, search."""
    resource = resource or name

    @route("GET", base, resource, {**LIST, **{field: "str" for field in filters}})
    def list_objects(call, given):
        return call.page(name, given, base, filters)

    if name in search.FIELDS:
        @route("GET", base + "/search", resource, {"query": "str!", "limit": "int", "page": "str"})
        def search_objects(call, given):
            return search.search(call, name, given, base + "/search")

    @route("GET", base + "/{id}", resource)
    def retrieve_object(call, given, identifier):
        return call.get(name, identifier)


def updatable(name, base, event, accepts, resource=None):
    """Update: metadata is merged, the other parameters replace."""
    @route("POST", base + "/{id}", resource or name, {"metadata": "metadata", **accepts})
    def update_object(call, given, identifier):
        obj = call.get(name, identifier)
        if obj.get("deleted"):
            raise errors.missing_object(name, identifier)
        return update(call, obj, given, event)


def update(call, obj, given, event):
    changes = {field: value for field, value in given.items() if field not in ("metadata", "expand")}
    if "metadata" in given:
        changes["metadata"] = params.merged_metadata(obj["metadata"], given["metadata"])
    previous = {field: obj.get(field) for field, value in changes.items() if obj.get(field) != value}
    obj.update(changes)
    call.effect("update", obj)
    if event and previous:
        call.emit(event, obj, previous)
    return obj


def metadata(given):
    return params.merged_metadata({}, given.get("metadata"))
