// Which instruction set the kernels use: the best one that the processor has, chosen once; tests force another.
#pragma once

namespace csq::cpu {

// avx512_vnni: avx512 and byte products with sums of 32 bits; avx512_vbmi: and products of bit matrices, shuffles of
// bytes.
enum class Isa { scalar, avx2, avx512, avx512_vnni, avx512_vbmi };
constexpr Isa kIsas[] = {Isa::scalar, Isa::avx2, Isa::avx512, Isa::avx512_vnni, Isa::avx512_vbmi};

const char* isa_name(Isa isa);
bool isa_supported(Isa isa);

Isa current_isa();
void force_isa(Isa isa);  // must be supported

}  // namespace csq::cpu
