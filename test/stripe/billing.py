"""Customers, products, prices, checkout sessions, subscriptions, invoices."""

import errors
import params
import payments
from errors import invalid, refused
from routes import metadata, readable, route, updatable, update
from store import visible

# Customers

CUSTOMER = {"email": "str", "name": "str", "phone": "str", "description": "str", "balance": "int",
            "address": "any", "shipping": "any", "invoice_settings": "hash", "metadata": "metadata",
            "preferred_locales": "list", "tax_exempt": "str", "source": "str"}


def customer_changes(call, given):
    settings = given.get("invoice_settings") or {}
    if settings.get("default_payment_method"):
        payments.check_payment_method(call, settings["default_payment_method"],
                                      "invoice_settings[default_payment_method]")
    if given.get("source"):
        payments.check_payment_method(call, given["source"], "source")
    changes = {name: value for name, value in given.items() if name not in ("source", "payment_method")}
    if given.get("source"):
        changes["default_source"] = payments.payment_method(call, given["source"])["id"]
    return changes


@route("POST", "/v1/customers", "customer", {**CUSTOMER, "payment_method": "str"})
def create_customer(call, given):
    meta = metadata(given)
    if given.get("payment_method"):
        payments.check_payment_method(call, given["payment_method"])
    changes = customer_changes(call, given)
    customer = call.new("customer", "cus", {
        "address": None, "balance": 0, "currency": None, "default_source": None,
        "delinquent": False, "description": None, "email": None,
        "invoice_settings": {"default_payment_method": None}, "name": None, "phone": None,
        "shipping": None, "tax_exempt": "none",
        **{name: value for name, value in changes.items() if name not in ("metadata", "expand")}},
        meta)
    if given.get("payment_method"):
        method = payments.payment_method(call, given["payment_method"])
        method["customer"] = customer["id"]
    call.emit("customer.created", customer)
    return customer


@route("POST", "/v1/customers/{id}", "customer", CUSTOMER)
def update_customer(call, given, identifier):
    customer = call.get("customer", identifier)
    if customer.get("deleted"):
        raise errors.missing_object("customer", identifier)
    return update(call, customer, customer_changes(call, given), "customer.updated")


@route("DELETE", "/v1/customers/{id}", "customer")
def delete_customer(call, given, identifier):
    customer = call.get("customer", identifier)
    if customer.get("deleted"):
        raise errors.missing_object("customer", identifier)
    call.emit("customer.deleted", customer)
    for name in [name for name in customer if name not in ("id", "object", "created")]:
        customer["_" + name] = customer.pop(name)
    customer["deleted"] = True
    call.effect("delete", customer)
    return {"id": identifier, "object": "customer", "deleted": True}


readable("customer", "/v1/customers", ["email"])


# Products and prices

@route("POST", "/v1/products", "product",
       {"id": "str", "name": "str!", "active": "bool", "description": "str", "metadata": "metadata"})
def create_product(call, given):
    return call.new("product", "prod", {"active": given.get("active", True),
                                        "description": given.get("description"),
                                        "name": given["name"]}, metadata(given))


readable("product", "/v1/products")
updatable("product", "/v1/products", "product.updated",
          {"name": "str", "active": "bool", "description": "str"})

PRICE_DATA = {"currency": "currency!", "unit_amount": "int!", "recurring": "hash", "product": "str",
              "product_data": "hash", "tax_behavior": "str"}


def new_price(call, given, meta):
    product = given.get("product")
    if product and call.find("product", product) is None:
        raise errors.missing_object("product", product, "product")
    if not product:
        name = (given.get("product_data") or {}).get("name")
        if not name:
            raise invalid("Missing required param: product.", param="product",
                          code="parameter_missing")
        product = call.new("product", "prod", {"active": True, "description": None, "name": name},
                           {}, effect=False)["id"]
    return call.new("price", "price", {
        "active": True, "currency": given["currency"], "lookup_key": given.get("lookup_key"),
        "product": product, "recurring": given.get("recurring"),
        "type": "recurring" if given.get("recurring") else "one_time",
        "unit_amount": given["unit_amount"]}, meta)


@route("POST", "/v1/prices", "plan",
       {**PRICE_DATA, "lookup_key": "str", "active": "bool", "metadata": "metadata"})
def create_price(call, given):
    return new_price(call, given, metadata(given))


readable("price", "/v1/prices", ["product"], resource="plan")
updatable("price", "/v1/prices", "price.updated", {"active": "bool", "lookup_key": "str"}, "plan")


def lines(call, given, param):
    """[(price or data to make one of, quantity)] of items or line_items, checked."""
    result = []
    for i, item in enumerate(params.as_list(given, param)):
        if not isinstance(item, dict):
            raise invalid("Invalid hash", param=f"{param}[{i}]")
        quantity = params.integer(item.get("quantity", "1"), f"{param}[{i}][quantity]")
        if item.get("price"):
            if call.find("price", item["price"]) is None:
                raise errors.missing_object("price", item["price"], f"{param}[{i}][price]")
            result.append((item["price"], quantity))
        elif isinstance(item.get("price_data"), dict):
            result.append((params.accept(item["price_data"], PRICE_DATA), quantity))
        else:
            raise invalid(f"Missing required param: {param}[{i}][price].",
                          param=f"{param}[{i}][price]", code="parameter_missing")
    return result


def priced(call, wanted):
    return [(call.find("price", price) if isinstance(price, str) else new_price(call, price, {}),
             quantity) for price, quantity in wanted]


# Subscriptions

SUBSCRIPTION = {"customer": "str!", "items": "list!", "default_payment_method": "str",
                "payment_behavior": "str", "metadata": "metadata", "description": "str",
                "cancel_at_period_end": "bool", "collection_method": "str", "off_session": "any",
                "days_until_due": "int", "trial_period_days": "int", "trial_end": "any",
                "payment_settings": "hash", "proration_behavior": "str", "currency": "currency"}
BEHAVIORS = ("allow_incomplete", "default_incomplete", "error_if_incomplete", "pending_if_incomplete")


@route("POST", "/v1/subscriptions", "subscription", SUBSCRIPTION)
def create_subscription(call, given):
    meta = metadata(given)
    customer = payments.check_customer(call, given["customer"])
    wanted = lines(call, given["items"], "items")
    if not wanted:
        raise invalid("Missing required param: items.", param="items", code="parameter_missing")
    behavior = given.get("payment_behavior", "allow_incomplete")
    if behavior not in BEHAVIORS:
        raise invalid("Invalid payment_behavior: must be one of " + ", ".join(BEHAVIORS),
                      param="payment_behavior")
    default = (given.get("default_payment_method")
               or (customer.get("invoice_settings") or {}).get("default_payment_method")
               or customer.get("default_source"))
    if default:
        payments.check_payment_method(call, default, "default_payment_method")
    free = given.get("trial_period_days") or given.get("collection_method") == "send_invoice"
    if not default and not free and behavior != "default_incomplete":
        raise invalid("This customer has no attached payment source or default payment method. "
                      "Please consider adding a default payment method.", code="resource_missing")
    return new_subscription(call, given, meta, wanted, default, behavior)


def new_subscription(call, given, meta, wanted, default, behavior):
    items = priced(call, wanted)
    total = sum(price["unit_amount"] * quantity for price, quantity in items)
    currency = items[0][0]["currency"]
    method = payments.payment_method(call, default)["id"] if default else None
    trial = given.get("trial_period_days")
    subscription = call.new("subscription", "sub", {
        "cancel_at_period_end": given.get("cancel_at_period_end", False), "canceled_at": None,
        "collection_method": given.get("collection_method", "charge_automatically"),
        "currency": currency, "customer": given["customer"], "default_payment_method": method,
        "description": given.get("description"), "ended_at": None,
        "items": {"object": "list", "has_more": False, "data": [
            {"id": call.world.new_id("si"), "object": "subscription_item", "created": call.now,
             "metadata": {}, "price": visible(price), "quantity": quantity}
            for price, quantity in items]},
        "latest_invoice": None, "start_date": call.now,
        "status": "trialing" if trial else "incomplete",
        "trial_end": call.now + 86400 * trial if trial else None}, meta)
    items_url = f"/v1/subscription_items?subscription={subscription['id']}"
    subscription["items"]["url"] = items_url
    invoice = call.new("invoice", "in", {
        "amount_due": 0 if trial else total, "amount_paid": 0, "attempted": False,
        "billing_reason": "subscription_create", "currency": currency,
        "customer": given["customer"], "number": None, "payment_intent": None, "status": "open",
        "subscription": subscription["id"], "total": 0 if trial else total}, {}, effect=False)
    subscription["latest_invoice"] = invoice["id"]
    call.emit("customer.subscription.created", subscription)

    if trial or subscription["collection_method"] == "send_invoice":
        if not trial:
            subscription["status"] = "active"
        return subscription
    intent = payments.new_intent(call, {"amount": total, "currency": currency,
                                        "customer": given["customer"], "payment_method": method}, {})
    invoice["payment_intent"] = intent["id"]
    if behavior == "default_incomplete":
        return subscription
    try:
        invoice["attempted"] = True
        payments.pay(call, intent, {"off_session": given.get("off_session")})
    except errors.ApiError:
        call.emit("invoice.payment_failed", invoice)
        if behavior == "error_if_incomplete":
            subscription["status"] = "incomplete_expired"
            call.store.remove(subscription)
            call.effect("fail", subscription)
            raise
        return subscription
    if intent["status"] == "succeeded":
        invoice.update(status="paid", amount_paid=total)
        subscription["status"] = "active"
        call.effect("activate", subscription)
        call.emit("invoice.paid", invoice)
        call.emit("customer.subscription.updated", subscription, {"status": "incomplete"})
    return subscription


@route("POST", "/v1/subscriptions/{id}", "subscription",
       {"metadata": "metadata", "cancel_at_period_end": "bool", "description": "str",
        "default_payment_method": "str"})
def update_subscription(call, given, identifier):
    subscription = call.get("subscription", identifier)
    if subscription["status"] == "canceled":
        raise refused("A canceled subscription can only update its cancellation_details and metadata.")
    return update(call, subscription, given, "customer.subscription.updated")


@route("DELETE", "/v1/subscriptions/{id}", "subscription",
       {"invoice_now": "bool", "prorate": "bool", "cancellation_details": "hash"})
def cancel_subscription(call, given, identifier):
    subscription = call.get("subscription", identifier)
    if subscription["status"] == "canceled":
        raise errors.missing_object("subscription", identifier)
    subscription.update(status="canceled", canceled_at=call.now, ended_at=call.now)
    call.effect("cancel", subscription)
    call.emit("customer.subscription.deleted", subscription)
    return subscription


@route("GET", "/v1/subscriptions", "subscription",
       {"limit": "int", "starting_after": "str", "ending_before": "str", "created": "any",
        "customer": "str", "price": "str", "status": "str"})
def list_subscriptions(call, given):
    """Without a status, those that aren't canceled."""
    wanted = given.pop("status", None)
    price = given.pop("price", None)
    shown = {identifier: sub for identifier, sub in call.store.of_type("subscription").items()
             if (wanted == "all" or (sub["status"] != "canceled" if wanted is None
                                     else sub["status"] == wanted))
             and (price is None or any(item["price"]["id"] == price for item in sub["items"]["data"]))}
    return call.page("subscription", given, "/v1/subscriptions", ["customer"], shown)


readable("subscription", "/v1/subscriptions")
readable("invoice", "/v1/invoices", ["customer", "subscription", "status"])


# Checkout sessions

SESSION = {"mode": "str!", "success_url": "str", "cancel_url": "str", "return_url": "str",
           "ui_mode": "str", "line_items": "list", "customer": "str", "customer_email": "str",
           "client_reference_id": "str", "currency": "currency", "expires_at": "int",
           "metadata": "metadata", "payment_intent_data": "hash", "subscription_data": "hash",
           "payment_method_types": "list", "allow_promotion_codes": "bool", "locale": "str",
           "customer_creation": "str", "automatic_tax": "hash", "submit_type": "str"}


@route("POST", "/v1/checkout/sessions", "checkout_session", SESSION)
def create_session(call, given):
    meta = metadata(given)
    mode = given["mode"]
    if mode not in ("payment", "subscription", "setup"):
        raise invalid("Invalid mode: must be one of payment, setup, or subscription", param="mode")
    wanted = lines(call, given.get("line_items", []), "line_items")
    if mode != "setup" and not wanted:
        raise invalid("Missing required param: line_items.", param="line_items",
                      code="parameter_missing")
    if not given.get("success_url") and given.get("ui_mode", "hosted") in ("hosted", "hosted_page"):
        raise invalid("Missing required param: success_url.", param="success_url",
                      code="parameter_missing")
    if given.get("customer"):
        payments.check_customer(call, given["customer"])
    inner = dict(given.get("payment_intent_data" if mode == "payment" else "subscription_data") or {})
    inner_meta = params.merged_metadata({}, inner.get("metadata"))
    items = priced(call, wanted)
    total = sum(price["unit_amount"] * quantity for price, quantity in items)
    session = call.new("checkout.session", "cs_live" if call.livemode else "cs_test", {
        "amount_subtotal": total, "amount_total": total, "cancel_url": given.get("cancel_url"),
        "client_reference_id": given.get("client_reference_id"),
        "currency": items[0][0]["currency"] if items else given.get("currency"),
        "customer": given.get("customer"), "customer_email": given.get("customer_email"),
        "expires_at": given.get("expires_at", call.now + 86400), "mode": mode,
        "payment_intent": None, "payment_method_types": ["card"], "payment_status": "unpaid",
        "status": "open", "subscription": None, "success_url": given.get("success_url"),
        "url": None, "_lines": [(price["id"], quantity) for price, quantity in items],
        "_metadata": inner_meta}, meta)
    session["url"] = f"https://checkout.stripe.com/c/pay/{session['id']}"
    return session


def refresh_session(call, session):
    """Sessions expire by themselves."""
    if session["status"] == "open" and call.now >= session["expires_at"]:
        session["status"] = "expired"
        session["url"] = None
        call.emit("checkout.session.expired", session)


@route("GET", "/v1/checkout/sessions", "checkout_session",
       {"limit": "int", "starting_after": "str", "ending_before": "str", "created": "any",
        "payment_intent": "str", "subscription": "str", "customer": "str", "status": "str"})
def list_sessions(call, given):
    for session in call.store.of_type("checkout.session").values():
        refresh_session(call, session)
    return call.page("checkout.session", given, "/v1/checkout/sessions",
                     ["payment_intent", "subscription", "customer", "status"])


@route("GET", "/v1/checkout/sessions/{id}", "checkout_session")
def retrieve_session(call, given, identifier):
    session = call.get("checkout.session", identifier)
    refresh_session(call, session)
    return session


updatable("checkout.session", "/v1/checkout/sessions", None, {}, "checkout_session")


@route("POST", "/v1/checkout/sessions/{id}/expire", "checkout_session")
def expire_session(call, given, identifier):
    session = call.get("checkout.session", identifier)
    refresh_session(call, session)
    if session["status"] != "open":
        raise refused("Only Checkout Sessions with a status in [\"open\"] can be expired. This "
                      f"Checkout Session has a status of {session['status']}.")
    session.update(status="expired", url=None)
    call.effect("expire", session)
    call.emit("checkout.session.expired", session)
    return session


def complete_session(call, session, card):
    """What the customer does on Stripe's page: no request of ours, so no key."""
    refresh_session(call, session)
    if session["status"] != "open":
        raise refused(f"This Checkout Session has a status of {session['status']}.")
    payments.check_payment_method(call, card)
    if session["customer"] is None and session["mode"] == "subscription":
        session["customer"] = create_customer(call, {})["id"]
    if session["mode"] == "payment":
        intent = payments.new_intent(call, {"amount": session["amount_total"],
                                            "currency": session["currency"],
                                            "customer": session["customer"],
                                            "payment_method": card}, session["_metadata"])
        session["payment_intent"] = intent["id"]
        payments.pay(call, intent, {})
    elif session["mode"] == "subscription":
        subscription = new_subscription(call, {"customer": session["customer"]},
                                        session["_metadata"], session["_lines"], card,
                                        "error_if_incomplete")
        session["subscription"] = subscription["id"]
    session.update(status="complete", url=None,
                   payment_status="no_payment_required" if session["mode"] == "setup" else "paid")
    call.effect("complete", session)
    call.emit("checkout.session.completed", session)
    return session
