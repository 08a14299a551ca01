"""The SGLang plugin: ``--disaggregation-transfer-backend pdxfer``.

SGLang finds it through the entry point ``sglang.srt.plugins: pdxfer = pdxfer.sglang.register:register``; nothing here
is imported before SGLang does so. docs/sglang.md is the user's page, docs/design/sglang.md says why it is built so.

==============  ===================================================================================================
register        the only file that touches SGLang's tables: choice, enum, class look-up, tokenizer workers
interface       which SGLang versions, and the probe of what is overridden
app             the HTTP application of tokenizer workers, with the plugin loaded
manager         one per rank: the protocol is SGLang's, every byte is moved by a pdxfer.Engine
sender          per request on the prefill side
receiver        per request on the decode side
bootstrap       the rank table of a prefill server
memory          registered memory, as SGLang hands it over: pointers and lengths
pairing         SGLang's buffer tables to factorised plans
links           peers by session id, and the watch over them
wire            the one message that is ours: a prefill rank introduces itself to the decode engine
ib_device       ``--disaggregation-ib-device``: parsing and checking
==============  ===================================================================================================
"""
