"""Assist: tools and thinking for a model whose engine can't do them, on every chat API, behind the relay's seam.

The prompt is rendered by the model's own chat template (in a helper process, `renderer`), sent as a raw completion, and
the answer is read as it streams (`reading`) and told in the API that was asked (`frames`). Entry: `assistant.Assist`.

Does not know: the relay (it meets it in `proxy.assist` only), jobs, registration.
"""
