"""Events, which reach back thirty days, and webhook endpoints."""

import errors
from routes import LIST, metadata, route
from webhooks import check_url

REACH = 30 * 24 * 3600


def recent(call):
    return {identifier: event for identifier, event in call.store.of_type("event").items()
            if event["created"] > call.now - REACH}


@route("GET", "/v1/events", "event",
       {**LIST, "type": "str", "types": "list", "delivery_success": "bool"})
def list_events(call, given):
    types = given.get("types")
    if types is not None and given.get("type"):
        raise errors.invalid("You may only specify one of these parameters: type, types.")
    if types is not None and len(types) > 20:
        raise errors.invalid("Array must have at most 20 elements", param="types")
    if given.get("type"):
        types = [given["type"]]

    def wanted(event):
        if types is not None and not any(
                event["type"] == kind or kind.endswith("*") and event["type"].startswith(kind[:-1])
                for kind in types):
            return False
        success = given.get("delivery_success")
        return success is None or call.world.webhooks.delivered(event["id"]) == success

    shown = {key: event for key, event in recent(call).items() if wanted(event)}
    return call.page("event", given, "/v1/events", (), shown)


@route("GET", "/v1/events/{id}", "event")
def retrieve_event(call, given, identifier):
    if identifier not in recent(call):
        raise errors.missing_object("event", identifier)
    return call.get("event", identifier)


@route("POST", "/v1/webhook_endpoints", "webhook",
       {"url": "str!", "enabled_events": "list!", "description": "str", "metadata": "metadata",
        "api_version": "str", "connect": "bool"})
def create_endpoint(call, given):
    meta = metadata(given)
    try:
        check_url(given["url"])
    except ValueError as error:
        raise errors.invalid(f"Invalid URL: {error}", param="url", code="url_invalid") from None
    endpoint = call.world.webhooks.add(
        call.world, {"url": given["url"], "enabled_events": given["enabled_events"],
                     "livemode": call.livemode, "account": call.account,
                     "connect": given.get("connect", False)})
    obj = call.new("webhook_endpoint", "we", {
        "api_version": given.get("api_version"), "description": given.get("description"),
        "enabled_events": given["enabled_events"], "status": "enabled", "url": given["url"],
        "_endpoint": endpoint["endpoint"]}, meta)
    return {**obj, "secret": endpoint["secrets"][0]}


@route("GET", "/v1/webhook_endpoints", "webhook", LIST)
def list_endpoints(call, given):
    return call.page("webhook_endpoint", given, "/v1/webhook_endpoints")


@route("GET", "/v1/webhook_endpoints/{id}", "webhook")
def retrieve_endpoint(call, given, identifier):
    return call.get("webhook_endpoint", identifier)


@route("DELETE", "/v1/webhook_endpoints/{id}", "webhook")
def delete_endpoint(call, given, identifier):
    endpoint = call.get("webhook_endpoint", identifier)
    call.world.webhooks.remove(endpoint["_endpoint"])
    call.store.remove(endpoint)
    call.effect("delete", endpoint)
    return {"id": identifier, "object": "webhook_endpoint", "deleted": True}
