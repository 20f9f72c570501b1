# Every command sets up what it needs; `make help` lists them.
SHELL := /bin/bash
VENV := .venv
PY := $(VENV)/bin/python
PROTOC := .tools/protoc
PROTOS := $(sort $(wildcard protos/stillhouse/v1/*.proto))

.PHONY: protos
protos: $(PROTOC)/.done ## regenerate the stubs from the .proto files
	$(PROTOC)/bin/python -m grpc_tools.protoc -I. -I$$($(PROTOC)/bin/python -c 'import site; print(site.getsitepackages()[0])') \
	  --plugin=protoc-gen-mypy=$(PROTOC)/bin/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=$(PROTOC)/bin/protoc-gen-mypy_grpc \
	  --python_out=. --grpc_python_out=. --mypy_out=quiet:. --mypy_grpc_out=quiet:. $(PROTOS)
	rm -f protos/stillhouse/v1/tensor_pb2_grpc.py protos/stillhouse/v1/tensor_pb2_grpc.pyi

# grpcio-tools 1.80 emits code for protobuf 6.31, which every newer runtime accepts; later ones need protobuf 7.
$(PROTOC)/.done:
	python3 -m venv $(PROTOC)
	$(PROTOC)/bin/pip install -q grpcio-tools==1.80.0 mypy-protobuf==5.1.0 googleapis-common-protos==1.76.0
	touch $@
