// From tensors to the plain arguments of paged_attention.cu.  Includes nothing of CUDA, so that
// any C++ compiler builds it against torch, for the GPU and for the CPU alike.
#include <ATen/core/Tensor.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <map>
#include <optional>
#include <stdexcept>
#include <string>

#include "arguments.h"

namespace {

Type type_of(const at::Tensor& tensor) {
    switch (tensor.scalar_type()) {
        case at::kFloat: return Type::float32;
        case at::kHalf: return Type::float16;
        case at::kBFloat16: return Type::bfloat16;
        case at::kFloat8_e4m3fn: return Type::float8;
        case at::kDouble: return Type::float64;
        default: throw std::runtime_error("the kernels know no tensors of this type");
    }
}

// The address and the number of elements from there to the end of the tensor's memory.
Array array(const at::Tensor& tensor) {
    const int64_t all = tensor.storage().nbytes() / tensor.element_size();
    return {tensor.data_ptr(), all - tensor.storage_offset()};
}

Array array(const std::optional<at::Tensor>& tensor) {
    return tensor ? array(*tensor) : Array();
}

}  // namespace

// See Attention in attention.cuh for the shapes; the query and the new keys and values may be
// rows of a wider tensor, everything else is contiguous.
void attention(const std::string& version, at::Tensor output, at::Tensor query, at::Tensor keys,
               at::Tensor values, at::Tensor block_tables, at::Tensor context_lengths,
               at::Tensor query_starts, at::Tensor query_lengths, int max_queries, int max_context,
               int window, double scale, int group, int splits, std::optional<at::Tensor> workspace,
               std::optional<at::Tensor> key_scales, std::optional<at::Tensor> value_scales,
               int64_t stream) {
    AttentionArguments x;
    x.version = version.c_str();
    x.type = type_of(query);
    x.cache_type = type_of(keys);
    x.output = array(output);
    x.query = array(query);
    x.keys = array(keys);
    x.values = array(values);
    x.key_scales = array(key_scales);
    x.value_scales = array(value_scales);
    x.block_tables = array(block_tables);
    x.context_lengths = array(context_lengths);
    x.query_starts = array(query_starts);
    x.query_lengths = array(query_lengths);
    x.workspace = array(workspace);
    x.query_stride = query.stride(0);
    x.num_seqs = context_lengths.size(0);
    x.max_queries = max_queries;
    x.max_context = max_context;
    x.heads = query.size(1);
    x.kv_heads = keys.size(2);
    x.head_size = query.size(2);
    x.block_size = keys.size(1);
    x.max_blocks = block_tables.size(1);
    x.window = window;
    x.splits = splits;
    x.group = group;
    x.scale = scale;
    x.stream = reinterpret_cast<void*>(stream);
    run_attention(x);
}

void write_cache(at::Tensor key, at::Tensor value, at::Tensor keys, at::Tensor values,
                 at::Tensor slots,
           std::optional<at::Tensor> key_scales, std::optional<at::Tensor> value_scales,
           int64_t stream) {
    WriteArguments x;
    x.type = type_of(key);
    x.cache_type = type_of(keys);
    x.key = array(key);
    x.value = array(value);
    x.keys = array(keys);
    x.values = array(values);
    x.slots = array(slots);
    x.key_scales = array(key_scales);
    x.value_scales = array(value_scales);
    x.key_stride = key.stride(0);
    x.value_stride = value.stride(0);
    x.num_tokens = key.size(0);
    x.kv_heads = key.size(1);
    x.head_size = key.size(2);
    x.stream = reinterpret_cast<void*>(stream);
    run_write(x);
}

// Pools of [planes, blocks, ...] or, with `block` and `plane` the other way round, their strides
// in elements; a piece is a block's part of a plane.
void copy_cache(at::Tensor source, at::Tensor target, at::Tensor pairs, int64_t source_plane,
          int64_t source_block, int64_t target_plane, int64_t target_block, int64_t piece,
          int num_planes, int64_t stream) {
    const int64_t chunk = 16 / source.element_size();
    if (piece % chunk || source_plane % chunk || source_block % chunk || target_plane % chunk ||
        target_block % chunk)
        throw std::runtime_error("a block's keys in a layer must be a multiple of 16 bytes");
    CopyArguments x;
    x.source = {source.data_ptr(), source.numel() / chunk};
    x.target = {target.data_ptr(), target.numel() / chunk};
    x.pairs = array(pairs);
    x.source_plane = source_plane / chunk;
    x.source_block = source_block / chunk;
    x.target_plane = target_plane / chunk;
    x.target_block = target_block / chunk;
    x.chunks = piece / chunk;
    x.num_pairs = pairs.size(0);
    x.num_planes = num_planes;
    x.stream = reinterpret_cast<void*>(stream);
    run_copy(x);
}

void set_seed(uint64_t seed) { seed_emulator(seed); }
