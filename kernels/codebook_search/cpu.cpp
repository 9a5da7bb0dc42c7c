// codebook_search on the CPU. FLOPs 2 N K D in the screening. Memory: a copy of the codes in bytes, a quarter of the
// codebook in fp32, where bytes_pay; a copy in fp32 of fp16 and bf16 codes, of those with NaN, Inf or a largest element
// beyond 2^20 or below 2^-20, and of those that are not contiguous; at most a few MB per thread; the outputs. Nothing
// grows with N K. Few vectors (8 to 64): no copy of ordinary contiguous codes, of fp16 and bf16 neither.
//
//   cpu.cpp               the op: outputs, choice of the instruction set, threads
//   cpu_search.h          how a search goes, its error bounds, and what its pieces hand each other
//   cpu_few.h, .cpp, cpu_few_kernels.h  few vectors: one pass over the codebook as it is
//   cpu_codes.h, .cpp     measures the codebook and packs it into bytes, once per call
//   cpu_block.h, .cpp     one thread's part: blocks of vectors, screened, then resolved
//   cpu_draw.cpp, cpu_draw_kernels.h  draw_codes, from the screening's bounds
//   cpu_exact.h           near ties in twice double precision
//   cpu_pack.h            the kernels that pack codes into bytes, and vectors
//   cpu_kernels.h         the kernels that screen in fp32, filter and resolve
//   cpu_portable.cpp, cpu_avx2.cpp, cpu_avx512.cpp (and .h)  both for each instruction set
//   cpu_avx512_vnni.cpp   the same, screening in bytes
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "../cpu_capability.h"
#include "cpu_block.h"
#include "cpu_few.h"

namespace beitv2_fast {

const Kernels& chosen_kernels() {
  switch (cpu_capability()) {
    case Capability::avx512_vnni: return avx512_vnni_kernels();
    case Capability::avx512: return avx512_kernels();
    case Capability::avx2: return avx2_kernels();
    default: return portable_kernels();
  }
}

namespace {

using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Outputs that nobody asked for are empty. The Python side has checked shapes, devices and k.
Outputs search(const at::Tensor& x, const at::Tensor& codebook, bool cosine, int64_t k, bool return_normalized,
               bool return_codes, bool return_distances) {
  const auto narrow = [](at::ScalarType t) { return t == at::kFloat || t == at::kHalf || t == at::kBFloat16; };
  TORCH_CHECK_TYPE(narrow(x.scalar_type()) && narrow(codebook.scalar_type()),
                   "the C++ codebook_search takes fp32, fp16 and bf16; got ", x.scalar_type(), " and ",
                   codebook.scalar_type());
  const int64_t rows = x.size(0), dim = x.size(1);
  const Kernels& kernels = chosen_kernels();
  const at::Tensor contiguous = codebook.contiguous();
  const auto floats = x.options().dtype(at::kFloat);
  at::Tensor indices = at::empty({rows * k}, x.options().dtype(at::kLong));
  at::Tensor normalized = return_normalized ? at::empty({rows, dim}, floats) : at::empty({0}, floats);
  at::Tensor codes = return_codes ? at::empty({rows, dim}, codebook.options()) : at::empty({0}, codebook.options());
  at::Tensor distances = at::empty({return_distances ? rows : 0}, floats);
  if (rows == 0) return {indices, normalized, codes, distances};

  PackedCodebook book;
  const Search shared = {kernels,
                         book,
                         x,
                         cosine,
                         k,
                         indices.mutable_data_ptr<int64_t>(),
                         return_normalized ? normalized.mutable_data_ptr<float>() : nullptr,
                         return_distances ? distances.mutable_data_ptr<float>() : nullptr,
                         return_codes ? static_cast<char*>(codes.mutable_data_ptr()) : nullptr,
                         contiguous};
  if (search_few(shared)) return {indices, normalized, codes, distances};
  book = pack_codebook(contiguous, cosine, bytes_pay(rows, codebook, k), kernels);
  run_blocks<Block>(shared);
  return {indices, normalized, codes, distances};
}

Outputs codebook_search(const at::Tensor& x, const at::Tensor& codebook, bool cosine, bool return_normalized,
                        bool return_codes, bool return_distances) {
  return search(x, codebook, cosine, 1, return_normalized, return_codes, return_distances);
}

at::Tensor nearest_codes(const at::Tensor& x, const at::Tensor& codebook, bool cosine, int64_t k) {
  return std::get<0>(search(x, codebook, cosine, k, false, false, false)).view({x.size(0), k});
}

TORCH_LIBRARY_FRAGMENT(beitv2_fast_cpu, m) {
  m.def(
      "codebook_search(Tensor x, Tensor codebook, bool cosine, bool return_normalized, bool return_codes, "
      "bool return_distances) -> (Tensor indices, Tensor normalized, Tensor codes, Tensor distances)");
  m.def("nearest_codes(Tensor x, Tensor codebook, bool cosine, int k) -> Tensor");
}

TORCH_LIBRARY_IMPL(beitv2_fast_cpu, CPU, m) {
  m.impl("codebook_search", codebook_search);
  m.impl("nearest_codes", nearest_codes);
}

}  // namespace
}  // namespace beitv2_fast
