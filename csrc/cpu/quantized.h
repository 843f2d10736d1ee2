// What the torch side of an op over codes reads of a QuantizedWeight's fields (ops/_quantized.py).
#pragma once
#include <array>
#include <optional>
#include <string>

#include "../common.h"

namespace peft_kernels {

inline const float* floats_of(const Tensor& tensor, int64_t count, const char* name) {
  STD_TORCH_CHECK(tensor.is_contiguous() && tensor.scalar_type() == ScalarType::Float &&
                      tensor.numel() == count,
                  name, " must be ", count, " contiguous float32; got ", tensor.numel());
  return tensor.const_data_ptr<float>();
}

inline const uint8_t* bytes_of(const Tensor& tensor, int64_t count, const char* name) {
  const ScalarType dtype = tensor.scalar_type();
  const bool has_bytes = dtype == ScalarType::Byte || dtype == ScalarType::Char ||
                         dtype == ScalarType::Float8_e4m3fn;
  STD_TORCH_CHECK(tensor.is_contiguous() && tensor.numel() == count && has_bytes, name, " must be ",
                  count, " contiguous bytes; got ", tensor.numel());
  return static_cast<const uint8_t*>(tensor.const_data_ptr());
}

// Of a power of 2; else -1.
inline int bits_of(int64_t size) {
  return size > 0 && (size & (size - 1)) == 0 ? __builtin_ctzll(size) : -1;
}

// A layout of GGUF's: its name, and the elements and bytes of a block.
struct Blocks {
  const char* name;
  Layout layout;
  int64_t elements, bytes;
};
constexpr std::array<Blocks, 5> BLOCKS{{{"q8_0", Layout::q8_0, 32, 34},
                                        {"q4_0", Layout::q4_0, 32, 18},
                                        {"q4_1", Layout::q4_1, 32, 20},
                                        {"q4_K", Layout::q4_K, 256, 144},
                                        {"q6_K", Layout::q6_K, 256, 210}}};

// QuantizedWeight's fields, as its op takes them.
struct __attribute__((visibility("hidden"))) CodesArguments {
  Tensor codes, scales;
  std::optional<Tensor> shifts, book, nested_scales, nested_book, nested_offset;
  int64_t n, block, block_rows, nested_block;
  double unit;
  std::string layout;
};

inline Codes in_blocks(const CodesArguments& c, int64_t k) {
  for (const Blocks& one : BLOCKS) {
    if (c.layout != one.name) continue;
    STD_TORCH_CHECK(k % one.elements == 0, "k must be a multiple of ", one.elements, "; got ", k);
    const int64_t bytes = c.n * k / one.elements * one.bytes;
    return {.layout = one.layout, .data = bytes_of(c.codes, bytes, "codes"), .cols = k};
  }
  STD_TORCH_CHECK(false, "layout is unknown: ", c.layout);
  return {};
}

inline Codes codes_of(const CodesArguments& c, int64_t k) {
  if (c.layout != "planes") return in_blocks(c, k);
  STD_TORCH_CHECK(c.block > 0 && c.block_rows > 0, "block must be positive; got ", c.block);
  const int64_t elements = c.n * k;
  const auto parts = [](int64_t whole, int64_t part) { return (whole + part - 1) / part; };
  const int64_t blocks = c.block_rows == 1 ? parts(elements, c.block)
                                           : parts(c.n, c.block_rows) * parts(k, c.block);
  const bool is_e4m3 = c.codes.scalar_type() == ScalarType::Float8_e4m3fn;
  Codes found{.layout = c.book ? Layout::nibbles : is_e4m3 ? Layout::e4m3 : Layout::bytes,
              .data = bytes_of(c.codes, c.book ? parts(elements, 2) : elements, "codes"),
              .cols = k,
              .book = c.book ? floats_of(*c.book, 16, "book") : nullptr,
              .block = c.block,
              .block_rows = c.block_rows,
              .unit = static_cast<float>(c.unit),
              .block_bits = bits_of(c.block),
              .nested_bits = bits_of(c.nested_block)};
  if (c.nested_scales) {
    STD_TORCH_CHECK(c.nested_book && c.nested_offset && c.nested_block > 0,
                    "nested scales need a book, an offset and a block");
    found.scale_codes = bytes_of(c.scales, blocks, "scales");
    found.nested_block = c.nested_block;
    const int64_t count = parts(blocks, c.nested_block);
    found.nested_scales = floats_of(*c.nested_scales, count, "nested_scales");
    found.nested_book = floats_of(*c.nested_book, 256, "nested_book");
    found.offset = *floats_of(*c.nested_offset, 1, "nested_offset");
    return found;
  }
  const auto numbers_of = [&](const Tensor& tensor, const char* name) {
    STD_TORCH_CHECK(tensor.is_contiguous() && tensor.numel() == blocks &&
                        tensor.scalar_type() == c.scales.scalar_type(),
                    name, " must be ", blocks, " contiguous numbers; got ", tensor.numel());
    return tensor.const_data_ptr();
  };
  found.scales = numbers_of(c.scales, "scales");
  found.scale_type = dtype_of(c.scales, "scales");
  if (c.shifts) found.shifts = numbers_of(*c.shifts, "shifts");
  return found;
}

}  // namespace peft_kernels
