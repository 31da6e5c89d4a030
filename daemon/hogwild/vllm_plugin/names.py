"""Names that both ends of the plugin use: the launcher, which must not import vllm, and the loader."""

SOCKET_VARIABLE = "HOGWILD_SOCKET"
URL_VARIABLE = "HOGWILD_SERVER_URL"
