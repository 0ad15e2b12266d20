"""Who may come in: the credentials that this installation takes, from its settings and key files."""

from __future__ import annotations

from contracts.ports import Clock
from deploy import keys
from deploy.settings import Settings, SettingsError
from governance.identity import Authenticator
from governance.oidc import OidcIssuer
from governance.postgres.directory import PostgresDirectory
from governance.tokens import TokenIssuer


def authenticator(settings: Settings, directory: PostgresDirectory, clock: Clock) -> Authenticator:
    """Who a credential belongs to: API keys, the installation's own tokens, and those of an OIDC issuer if one is set.

    A host without token keys takes API keys only. Raises SettingsError for half an OIDC configuration.
    """
    if (settings.oidc_issuer is None) != (settings.oidc_audience is None):
        raise SettingsError("set RISKFLEET_OIDC_ISSUER and RISKFLEET_OIDC_AUDIENCE both, or none")
    oidc = (
        OidcIssuer(settings.oidc_issuer, settings.oidc_audience, clock)
        if settings.oidc_issuer and settings.oidc_audience
        else None
    )
    return Authenticator(directory, directory, token_issuer(settings), clock, oidc)


def token_issuer(settings: Settings) -> TokenIssuer | None:
    """The installation's own issuer, None where there is no key to verify with."""
    if settings.jwt_secret is not None:
        return TokenIssuer(secret=settings.jwt_secret.get_secret_value().encode())
    private, publics = keys.token_private(settings), keys.token_publics(settings)
    return TokenIssuer(private=private, publics=publics) if private or publics else None
