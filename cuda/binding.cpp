// Makes the launchers callable from Python, with a dictionary of the fields of their arguments.
//
// An array is given as (address, number of elements), so that this includes neither torch nor
// CUDA; who calls it keeps the tensors alive until the launch has returned.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "arguments.h"

namespace {

// Reads the fields of a dictionary; a field that is not there is 0.
class Fields {
public:
    explicit Fields(const pybind11::dict& fields) : fields_(fields) {}

    int64_t number(const char* name) const {
        return fields_.contains(name) ? fields_[name].cast<int64_t>() : 0;
    }
    double real(const char* name) const { return fields_[name].cast<double>(); }
    std::string text(const char* name) const { return fields_[name].cast<std::string>(); }
    Array array(const char* name) const {
        if (!fields_.contains(name)) return {};
        const auto pair = fields_[name].cast<pybind11::tuple>();
        return {reinterpret_cast<void*>(pair[0].cast<uintptr_t>()), pair[1].cast<int64_t>()};
    }
    Type type(const char* name) const {
        const std::string type = text(name);
        if (type == "float32") return Type::float32;
        if (type == "float16") return Type::float16;
        if (type == "bfloat16") return Type::bfloat16;
        if (type == "float8_e4m3fn") return Type::float8;
        if (type == "float64") return Type::float64;
        throw std::runtime_error("the kernels know no tensors of type " + type);
    }

private:
    const pybind11::dict& fields_;
};

void attention(const pybind11::dict& fields) {
    const Fields in(fields);
    AttentionArguments x;
    x.version = in.text("version");
    x.type = in.type("type");
    x.cache_type = in.type("cache_type");
    x.output = in.array("output");
    x.query = in.array("query");
    x.keys = in.array("keys");
    x.values = in.array("values");
    x.key_scales = in.array("key_scales");
    x.value_scales = in.array("value_scales");
    x.block_tables = in.array("block_tables");
    x.context_lengths = in.array("context_lengths");
    x.query_starts = in.array("query_starts");
    x.query_lengths = in.array("query_lengths");
    x.workspace = in.array("workspace");
    x.query_stride = in.number("query_stride");
    x.num_seqs = in.number("num_seqs");
    x.max_queries = in.number("max_queries");
    x.max_context = in.number("max_context");
    x.heads = in.number("heads");
    x.kv_heads = in.number("kv_heads");
    x.head_size = in.number("head_size");
    x.block_size = in.number("block_size");
    x.max_blocks = in.number("max_blocks");
    x.window = in.number("window");
    x.splits = in.number("splits");
    x.group = in.number("group");
    x.scale = in.real("scale");
    x.stream = in.number("stream");
    run_attention(x);
}

void write_cache(const pybind11::dict& fields) {
    const Fields in(fields);
    WriteArguments x;
    x.type = in.type("type");
    x.cache_type = in.type("cache_type");
    x.key = in.array("key");
    x.value = in.array("value");
    x.keys = in.array("keys");
    x.values = in.array("values");
    x.slots = in.array("slots");
    x.key_scales = in.array("key_scales");
    x.value_scales = in.array("value_scales");
    x.key_stride = in.number("key_stride");
    x.value_stride = in.number("value_stride");
    x.num_tokens = in.number("num_tokens");
    x.kv_heads = in.number("kv_heads");
    x.head_size = in.number("head_size");
    x.stream = in.number("stream");
    run_write(x);
}

void copy_cache(const pybind11::dict& fields) {
    const Fields in(fields);
    CopyArguments x;
    x.source = in.array("source");
    x.target = in.array("target");
    x.pairs = in.array("pairs");
    x.source_plane = in.number("source_plane");
    x.source_block = in.number("source_block");
    x.target_plane = in.number("target_plane");
    x.target_block = in.number("target_block");
    x.chunks = in.number("chunks");
    x.num_pairs = in.number("num_pairs");
    x.num_planes = in.number("num_planes");
    x.stream = in.number("stream");
    run_copy(x);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    m.def("attention", &attention);
    m.def("write_cache", &write_cache);
    m.def("copy_cache", &copy_cache);
    m.def("seed_emulator", &seed_emulator);
}
