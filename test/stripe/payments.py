"""Payment methods, payment intents, charges and refunds.

A card behaves as the test payment method that it was made from; a payment
method made from pm_card_chargeDeclined is declined for ever.
"""

import errors
from errors import invalid, refused
from routes import metadata, readable, route, updatable, update
from store import visible

# what -> (brand, last4, code, decline_code, message)
DECLINED = "Your card was declined."
CARDS = {
    "visa": ("visa", "4242", None, None, None),
    "visa_debit": ("visa", "5556", None, None, None),
    "mastercard": ("mastercard", "4444", None, None, None),
    "amex": ("amex", "8431", None, None, None),
    "us": ("visa", "4242", None, None, None),
    "chargeDeclined": ("visa", "0002", "card_declined", "generic_decline", DECLINED),
    "chargeCustomerFail": ("visa", "0341", "card_declined", "generic_decline", DECLINED),
    "chargeDeclinedInsufficientFunds": ("visa", "9995", "card_declined", "insufficient_funds",
                                        "Your card has insufficient funds."),
    "chargeDeclinedLostCard": ("visa", "9987", "card_declined", "lost_card", DECLINED),
    "chargeDeclinedStolenCard": ("visa", "9979", "card_declined", "stolen_card", DECLINED),
    "chargeDeclinedFraudulent": ("visa", "0019", "card_declined", "fraudulent", DECLINED),
    "chargeDeclinedExpiredCard": ("visa", "0069", "expired_card", None, "Your card has expired."),
    "chargeDeclinedIncorrectCvc": ("visa", "0127", "incorrect_cvc", None,
                                   "Your card's security code is incorrect."),
    "chargeDeclinedProcessingError": ("visa", "0119", "processing_error", None,
                                      "An error occurred while processing your card. Try again in "
                                      "a little bit."),
    "authenticationRequired": ("visa", "3184", None, None, None),
}


# Payment methods

def new_payment_method(call, card, meta=None, customer=None):
    brand, last4, *_ = CARDS[card]
    return call.new("payment_method", "pm",
                    {"billing_details": {"address": None, "email": None, "name": None, "phone": None},
                     "card": {"brand": brand, "exp_month": 12, "exp_year": 2034, "funding": "credit",
                              "last4": last4},
                     "customer": customer, "type": "card", "_card": card},
                    meta or {}, effect=False)


def test_card(identifier):
    """The card of a test id such as pm_card_visa or tok_visa."""
    for prefix in ("pm_card_", "tok_"):
        if identifier.startswith(prefix) and identifier[len(prefix):] in CARDS:
            return identifier[len(prefix):]
    return None


def payment_method(call, identifier, param="payment_method"):
    """The payment method of an id, or a new one of a test id such as pm_card_visa."""
    card = test_card(identifier)
    if card is not None:
        return new_payment_method(call, card)
    found = call.find("payment_method", identifier)
    if found is None:
        raise errors.missing_object("PaymentMethod", identifier, param)
    return found


def check_payment_method(call, identifier, param="payment_method"):
    """Refuse an unknown id before anything happens."""
    if test_card(identifier) is None:
        if call.find("payment_method", identifier) is None:
            raise errors.missing_object("PaymentMethod", identifier, param)


def check_customer(call, identifier):
    customer = call.find("customer", identifier)
    if customer is None or customer.get("deleted"):
        raise errors.missing_object("customer", identifier, "customer")
    return customer


@route("POST", "/v1/payment_methods", "payment_method",
       {"type": "str!", "card": "hash", "billing_details": "hash", "metadata": "metadata"})
def create_payment_method(call, given):
    token = (given.get("card") or {}).get("token", "tok_visa")
    if given["type"] != "card" or not token.startswith("tok_") or token[4:] not in CARDS:
        raise errors.missing_object("token", token, "card[token]")
    return new_payment_method(call, token[4:], metadata(given))


@route("POST", "/v1/payment_methods/{id}/attach", "payment_method", {"customer": "str!"})
def attach_payment_method(call, given, identifier):
    check_customer(call, given["customer"])
    found = payment_method(call, identifier, "id")
    found["customer"] = given["customer"]
    call.emit("payment_method.attached", found)
    return found


@route("POST", "/v1/payment_methods/{id}/detach", "payment_method")
def detach_payment_method(call, given, identifier):
    found = call.get("payment_method", identifier)
    found["customer"] = None
    call.emit("payment_method.detached", found)
    return found


readable("payment_method", "/v1/payment_methods", ["customer", "type"])
updatable("payment_method", "/v1/payment_methods", "payment_method.updated",
          {"billing_details": "hash"})


# Charges

def charge_card(call, method, amount, currency, captured, meta, fields):
    """One attempt to charge a card: a charge, succeeded or failed."""
    card = method["_card"]
    _, _, code, decline_code, message = CARDS[card]
    failed = code is not None
    charge = call.new("charge", "ch", {
        "amount": amount, "amount_captured": amount if captured and not failed else 0,
        "amount_refunded": 0, "balance_transaction": None, "captured": captured and not failed,
        "currency": currency, "customer": None, "description": None, "failure_code": code,
        "failure_message": message,
        "outcome": {"network_status": "declined_by_network" if failed else "approved_by_network",
                    "reason": decline_code, "risk_level": "normal",
                    "type": "issuer_declined" if failed else "authorized"},
        "paid": not failed, "payment_intent": None, "payment_method": method["id"],
        "payment_method_details": {"card": dict(method["card"]), "type": "card"},
        "refunded": False, "status": "failed" if failed else "succeeded", "transfer_group": None,
        **fields}, meta, effect=False)
    if charge["captured"]:
        charge["balance_transaction"] = call.world.new_id("txn")
    call.effect("create", charge, payment_intent=charge["payment_intent"])
    call.emit("charge.failed" if failed else "charge.succeeded", charge)
    return charge


def declined(charge, **fields):
    """The 402 of a failed charge."""
    decline_code = charge["outcome"]["reason"]
    return errors.ApiError(402, "card_error", charge["failure_message"], charge=charge["id"],
                           code=charge["failure_code"], decline_code=decline_code, **fields)


CHARGE = {"amount": "amount!", "currency": "currency!", "source": "str", "customer": "str",
          "capture": "bool", "description": "str", "metadata": "metadata", "receipt_email": "str",
          "statement_descriptor": "str", "statement_descriptor_suffix": "str",
          "transfer_group": "str", "transfer_data": "hash", "application_fee_amount": "int",
          "on_behalf_of": "str", "shipping": "hash"}


@route("POST", "/v1/charges", "charge", CHARGE)
def create_charge(call, given):
    meta = metadata(given)
    if given.get("customer"):
        customer = check_customer(call, given["customer"])
        source = given.get("source") or customer.get("default_source")
    else:
        source = given.get("source")
    if not source:
        raise invalid("Must provide source or customer.", code="parameter_missing")
    check_payment_method(call, source, "source")
    method = payment_method(call, source, "source")
    charge = charge_card(call, method, given["amount"], given["currency"],
                         given.get("capture", True), meta,
                         {"customer": given.get("customer"), "description": given.get("description"),
                          "transfer_group": given.get("transfer_group")})
    if charge["status"] == "failed":
        raise declined(charge)
    return charge


def capture(call, charge, amount):
    charge.update(captured=True, amount_captured=amount,
                  balance_transaction=call.world.new_id("txn"))
    if amount < charge["amount"]:
        charge["amount_refunded"] = charge["amount"] - amount
    call.effect("capture", charge, captured=amount)
    call.emit("charge.captured", charge)


@route("POST", "/v1/charges/{id}/capture", "charge", {"amount": "amount"})
def capture_charge(call, given, identifier):
    charge = call.get("charge", identifier)
    if charge["captured"]:
        raise refused(f"Charge {identifier} has already been captured.",
                      code="charge_already_captured")
    if charge["status"] != "succeeded" or charge["refunded"]:
        raise refused(f"Charge {identifier} can't be captured.", code="charge_not_capturable")
    amount = given.get("amount", charge["amount"])
    if amount > charge["amount"]:
        raise refused("The amount to capture is greater than the amount of the charge.",
                      code="amount_too_large", param="amount")
    capture(call, charge, amount)
    return charge


readable("charge", "/v1/charges", ["customer", "payment_intent", "transfer_group"])
updatable("charge", "/v1/charges", "charge.updated",
          {"description": "str", "receipt_email": "str", "transfer_group": "str"})


# Payment intents

INTENT = {"amount": "amount", "currency": "currency", "customer": "str", "description": "str",
          "metadata": "metadata", "payment_method": "str", "payment_method_types": "list",
          "payment_method_options": "hash", "payment_method_data": "hash", "receipt_email": "str",
          "setup_future_usage": "str", "shipping": "any", "statement_descriptor": "str",
          "statement_descriptor_suffix": "str", "transfer_data": "hash", "transfer_group": "str",
          "application_fee_amount": "int", "capture_method": "str"}
CREATE_INTENT = {**INTENT, "amount": "amount!", "currency": "currency!",
                 "automatic_payment_methods": "hash", "confirm": "bool",
                 "confirmation_method": "str", "off_session": "any", "on_behalf_of": "str",
                 "return_url": "str", "error_on_requires_action": "bool", "use_stripe_sdk": "bool"}
CONFIRM_INTENT = {"payment_method": "str", "payment_method_data": "hash",
                  "payment_method_options": "hash", "payment_method_types": "list",
                  "off_session": "any", "return_url": "str", "receipt_email": "str",
                  "setup_future_usage": "str", "shipping": "any", "capture_method": "str",
                  "error_on_requires_action": "bool", "use_stripe_sdk": "bool"}
CAPTURE_METHODS = ("automatic", "automatic_async", "manual")


def check_intent(call, given):
    if given.get("customer"):
        check_customer(call, given["customer"])
    if given.get("payment_method"):
        check_payment_method(call, given["payment_method"])
    if given.get("capture_method", "automatic") not in CAPTURE_METHODS:
        raise invalid("Invalid capture_method: must be one of automatic, automatic_async, or manual",
                      param="capture_method")


def new_intent(call, given, meta):
    method = given.get("payment_method")
    method = payment_method(call, method)["id"] if method else None
    intent = call.new("payment_intent", "pi", {
        "amount": given["amount"], "amount_capturable": 0, "amount_received": 0,
        "application_fee_amount": given.get("application_fee_amount"),
        "automatic_payment_methods": given.get("automatic_payment_methods"),
        "canceled_at": None, "cancellation_reason": None,
        "capture_method": given.get("capture_method", "automatic_async"), "client_secret": None,
        "confirmation_method": given.get("confirmation_method", "automatic"),
        "currency": given["currency"], "customer": given.get("customer"),
        "description": given.get("description"), "last_payment_error": None, "latest_charge": None,
        "next_action": None, "on_behalf_of": given.get("on_behalf_of"), "payment_method": method,
        "payment_method_types": given.get("payment_method_types", ["card"]),
        "receipt_email": given.get("receipt_email"),
        "setup_future_usage": given.get("setup_future_usage"), "shipping": given.get("shipping"),
        "statement_descriptor": given.get("statement_descriptor"),
        "statement_descriptor_suffix": given.get("statement_descriptor_suffix"),
        "status": "requires_confirmation" if method else "requires_payment_method",
        "transfer_data": given.get("transfer_data"),
        "transfer_group": given.get("transfer_group")}, meta)
    intent["client_secret"] = f"{intent['id']}_secret_{call.world.seed}"
    call.emit("payment_intent.created", intent)
    return intent


@route("POST", "/v1/payment_intents", "payment_intent", CREATE_INTENT)
def create_intent(call, given):
    meta = metadata(given)
    check_intent(call, given)
    confirm = given.get("confirm", False)
    if not confirm:
        for name in ("off_session", "return_url", "error_on_requires_action"):
            if name in given:
                raise invalid(f"The parameter `{name}` cannot be passed when creating a "
                              "PaymentIntent unless `confirm` is set to true.", param=name)
    elif not given.get("payment_method"):
        raise invalid("You cannot confirm this PaymentIntent because it's missing a payment method. "
                      "To confirm the PaymentIntent, specify a payment method attached to this "
                      "customer along with the customer ID.", code="parameter_missing",
                      param="payment_method")
    intent = new_intent(call, given, meta)
    if confirm:
        pay(call, intent, given)
    return intent


def pay(call, intent, given):
    """Confirm: charge the payment method."""
    method = call.get("payment_method", intent["payment_method"], "payment_method")
    off_session = given.get("off_session") not in (None, "false", False)
    if method["_card"] == "authenticationRequired":
        if off_session:
            failure(call, intent, method, None, "authentication_required",
                    "authentication_required",
                    "Your card was declined. This transaction requires authentication.")
        intent.update(status="requires_action",
                      next_action={"type": "use_stripe_sdk", "use_stripe_sdk": {}})
        call.effect("requires_action", intent)
        call.emit("payment_intent.requires_action", intent)
        return
    manual = intent["capture_method"] == "manual"
    charge = charge_card(call, method, intent["amount"], intent["currency"], not manual,
                         dict(intent["metadata"]),
                         {"customer": intent["customer"], "description": intent["description"],
                          "payment_intent": intent["id"],
                          "transfer_group": intent["transfer_group"]})
    intent.update(latest_charge=charge["id"], next_action=None)
    if charge["status"] == "failed":
        failure(call, intent, method, charge, charge["failure_code"], charge["outcome"]["reason"],
                charge["failure_message"])
    intent["last_payment_error"] = None
    if manual:
        intent.update(status="requires_capture", amount_capturable=intent["amount"])
        call.effect("confirm", intent)
        call.emit("payment_intent.amount_capturable_updated", intent)
    else:
        intent.update(status="succeeded", amount_received=intent["amount"])
        call.effect("confirm", intent)
        call.emit("payment_intent.succeeded", intent)


def failure(call, intent, method, charge, code, decline_code, message):
    """A decline leaves the intent, which waits for another payment method."""
    intent.update(status="requires_payment_method", payment_method=None, next_action=None)
    intent["last_payment_error"] = errors.error_body(
        "card_error", message, charge=charge and charge["id"], code=code,
        decline_code=decline_code, payment_method=visible(method))
    call.effect("fail", intent)
    call.emit("payment_intent.payment_failed", intent)
    raise errors.ApiError(402, "card_error", message, charge=charge and charge["id"], code=code,
                          decline_code=decline_code, payment_intent=visible(intent),
                          payment_method=visible(method))


def unexpected_state(intent, verb, done, allowed):
    return refused(f"You cannot {verb} this PaymentIntent because it has a status of "
                   f"{intent['status']}. Only a PaymentIntent with one of the following statuses "
                   f"may be {done}: {', '.join(allowed)}.",
                   code="payment_intent_unexpected_state", payment_intent=visible(intent))


@route("POST", "/v1/payment_intents/{id}/confirm", "payment_intent", CONFIRM_INTENT)
def confirm_intent(call, given, identifier):
    check_intent(call, given)
    intent = call.get("payment_intent", identifier)
    allowed = ("requires_payment_method", "requires_confirmation", "requires_action")
    if intent["status"] not in allowed:
        raise unexpected_state(intent, "confirm", "confirmed", allowed)
    if given.get("payment_method"):
        intent["payment_method"] = payment_method(call, given["payment_method"])["id"]
    if not intent["payment_method"]:
        raise refused("You cannot confirm this PaymentIntent because it's missing a payment method.",
                      code="payment_intent_unexpected_state", payment_intent=visible(intent))
    if given.get("capture_method"):
        intent["capture_method"] = given["capture_method"]
    pay(call, intent, given)
    return intent


@route("POST", "/v1/payment_intents/{id}/capture", "payment_intent",
       {"amount_to_capture": "amount", "metadata": "metadata", "final_capture": "bool",
        "statement_descriptor": "str", "application_fee_amount": "int"})
def capture_intent(call, given, identifier):
    intent = call.get("payment_intent", identifier)
    if intent["status"] != "requires_capture":
        raise unexpected_state(intent, "capture", "captured", ("requires_capture",))
    amount = given.get("amount_to_capture", intent["amount_capturable"])
    if amount > intent["amount_capturable"]:
        raise refused("The amount to capture is greater than the capturable amount.",
                      code="amount_too_large", param="amount_to_capture")
    capture(call, call.get("charge", intent["latest_charge"], "charge"), amount)
    intent.update(status="succeeded", amount_received=amount, amount_capturable=0)
    call.effect("capture", intent)
    call.emit("payment_intent.succeeded", intent)
    return intent


@route("POST", "/v1/payment_intents/{id}/cancel", "payment_intent", {"cancellation_reason": "str"})
def cancel_intent(call, given, identifier):
    intent = call.get("payment_intent", identifier)
    allowed = ("requires_payment_method", "requires_capture", "requires_confirmation",
               "requires_action", "processing")
    if intent["status"] not in allowed:
        raise unexpected_state(intent, "cancel", "canceled", allowed)
    if intent["status"] == "requires_capture":
        refund(call, call.get("charge", intent["latest_charge"], "charge"), intent["amount"], None, {})
    intent.update(status="canceled", canceled_at=call.now, amount_capturable=0,
                  cancellation_reason=given.get("cancellation_reason"))
    call.effect("cancel", intent)
    call.emit("payment_intent.canceled", intent)
    return intent


readable("payment_intent", "/v1/payment_intents", ["customer"])

@route("POST", "/v1/payment_intents/{id}", "payment_intent", INTENT)
def update_intent(call, given, identifier):
    check_intent(call, given)
    intent = call.get("payment_intent", identifier)
    allowed = ("requires_payment_method", "requires_confirmation", "requires_action")
    if intent["status"] not in allowed and set(given) - {"metadata", "description", "expand"}:
        raise unexpected_state(intent, "update", "updated", allowed)
    if given.get("payment_method"):
        given["payment_method"] = payment_method(call, given["payment_method"])["id"]
        intent["status"] = "requires_confirmation"
    return update(call, intent, given, None)


# Refunds

def refund(call, charge, amount, reason, meta):
    made = call.new("refund", "re", {
        "amount": amount, "balance_transaction": call.world.new_id("txn"), "charge": charge["id"],
        "currency": charge["currency"], "payment_intent": charge["payment_intent"],
        "reason": reason, "status": "succeeded"}, meta)
    charge["amount_refunded"] += amount
    charge["refunded"] = charge["amount_refunded"] >= charge["amount"]
    call.emit("charge.refunded", charge)
    call.emit("refund.created", made)
    return made


@route("POST", "/v1/refunds", "charge",
       {"charge": "str", "payment_intent": "str", "amount": "amount", "reason": "str",
        "metadata": "metadata", "refund_application_fee": "bool", "reverse_transfer": "bool",
        "instructions_email": "str"})
def create_refund(call, given):
    meta = metadata(given)
    if bool(given.get("charge")) == bool(given.get("payment_intent")):
        raise invalid("One of the following params should be provided for this request: "
                      "payment_intent or charge.", code="parameter_missing")
    if given.get("charge"):
        charge = call.get("charge", given["charge"], "charge")
    else:
        intent = call.get("payment_intent", given["payment_intent"], "payment_intent")
        if not intent["latest_charge"]:
            raise refused(f"This PaymentIntent ({intent['id']}) does not have a successful charge to "
                          "refund.", param="payment_intent")
        charge = call.get("charge", intent["latest_charge"], "charge")
    if charge["status"] != "succeeded":
        raise refused(f"Charge {charge['id']} has not succeeded.", param="charge")
    left = charge["amount"] - charge["amount_refunded"]
    if left == 0:
        raise refused(f"Charge {charge['id']} has already been refunded.",
                      code="charge_already_refunded")
    amount = given.get("amount", left)
    if amount > left:
        raise refused(f"Refund amount ({amount}) is greater than unrefunded amount on charge "
                      f"({left})", param="amount")
    return refund(call, charge, amount, given.get("reason"), meta)


readable("refund", "/v1/refunds", ["charge", "payment_intent"], resource="charge")
updatable("refund", "/v1/refunds", "refund.updated", {}, resource="charge")
