// The parts of a product with packed weights for x86, written once over a vector type V. Included inside a target
// region and inside an anonymous namespace, after V, by one source file for each instruction set.

// Bytes ahead that the stream of planes is asked for; measured: without it a core reads a third less.
constexpr int kPrefetch = 4096;

inline float sum_to_float(__m256 x) {
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
inline float max_to_float(__m256 x) {
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}
inline int32_t sum_to_int(__m256i x) {
    __m128i y = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    y = _mm_add_epi32(y, _mm_shuffle_epi32(y, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(y, _mm_shuffle_epi32(y, 0xb1)));
}

// Of signed bytes, in 32 bits.
inline __m256i sums_of_four(__m256i bytes) {
    return _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes), _mm256_set1_epi16(1));
}

inline __m256 magnitude(__m256 x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }

// The upper and the lower byte of q, both rounded to signed ones; q - 256 * upper is the lower.
inline __m256i upper_byte(__m256i q) { return _mm256_srai_epi32(_mm256_add_epi32(q, _mm256_set1_epi32(128)), 8); }
inline __m256i lower_byte(__m256i q, __m256i upper) { return _mm256_sub_epi32(q, _mm256_slli_epi32(upper, 8)); }

inline __m256i narrow(__m256i a, __m256i b, __m256i c, __m256i d) {
    const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
    return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

void quantize(const float* x, int count, const Quantization& quantization, InputBlock& block) {
    const bool two = quantization.limbs == 2;
    alignas(32) float padded[kTileColumns];
    if (count < quantization.columns) {
        std::fill(std::copy_n(x, count, padded), padded + quantization.columns, 0.0f);
        x = padded;
    }
    __m256 most = _mm256_setzero_ps(), most_of_groups = most, not_finite = most;
    for (int i = 0; i < quantization.columns; i += 32) {
        __m256 v[4];
        for (int j = 0; j < 4; ++j) {
            v[j] = _mm256_loadu_ps(x + i + 8 * j);
            not_finite = _mm256_add_ps(not_finite, _mm256_mul_ps(v[j], _mm256_setzero_ps()));
            v[j] = magnitude(v[j]);
            most = _mm256_max_ps(most, v[j]);
        }
        const __m256 groups = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
        most_of_groups = _mm256_max_ps(most_of_groups, groups);
    }
    float step = quantization.element > 0.0f ? max_to_float(most) / quantization.element : 0.0f;
    if (quantization.group > 0.0f) step = std::max(step, max_to_float(most_of_groups) / quantization.group);
    if (sum_to_float(not_finite) != 0.0f) step = std::numeric_limits<float>::quiet_NaN();
    if (step < std::numeric_limits<float>::min()) step = 0.0f;
    block.step = step;
    const __m256 inverse = _mm256_set1_ps(step > 0.0f ? 1.0f / step : 0.0f);
    __m256i sums[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    for (int i = 0; i < quantization.columns; i += 32) {
        __m256i upper[4], lower[4];
        for (int j = 0; j < 4; ++j) {
            __m256 v = _mm256_loadu_ps(x + i + 8 * j);
            if (!(step > 0.0f)) v = _mm256_setzero_ps();
            const __m256i q = _mm256_cvtps_epi32(_mm256_mul_ps(v, inverse));
            upper[j] = two ? upper_byte(q) : q;
            lower[j] = lower_byte(q, upper[j]);
            sums[0] = _mm256_add_epi32(sums[0], upper[j]);
            sums[1] = _mm256_add_epi32(sums[1], lower[j]);
        }
        const auto store = [&](int8_t* limb, const __m256i* q) {
            _mm256_store_si256(reinterpret_cast<__m256i*>(limb + i), narrow(q[0], q[1], q[2], q[3]));
        };
        store(block.limbs[0], upper);
        if (two) store(block.limbs[1], lower);
    }
    for (int limb = 0; limb < 2; ++limb) block.sums[limb] = sum_to_int(sums[limb]);
}

inline void store_table(uint8_t* to, __m128i table) {
    static_assert(V::table_copies <= kMostTableCopies);
    for (int copy = 0; copy < V::table_copies; ++copy) _mm_storeu_si128(reinterpret_cast<__m128i*>(to) + copy, table);
}

// Tables of one byte serve half a tile's columns, of two bytes all of them.
template <int T>
constexpr int kParts = T == 1 ? 2 : 1;
template <int T>
constexpr int kPartGroups = kGroups / kParts<T>;

// Bytes of inputs whose index in a table has bit c, the inputs being byte `at + c` of each 128 bits.
inline __m256i sums_of_parts(__m256i inputs, int at) {
    __m256i table = _mm256_setzero_si256();
    for (int c = 0; c < kGroup; ++c) {
        const __m256i index =
            _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
        const __m256i bit = _mm256_set1_epi8(static_cast<char>(1 << c));
        const __m256i has = _mm256_cmpeq_epi8(_mm256_and_si256(index, bit), bit);
        const __m256i input = _mm256_shuffle_epi8(inputs, _mm256_set1_epi8(static_cast<char>(at + c)));
        table = _mm256_add_epi8(table, _mm256_and_si256(input, has));
    }
    return table;
}

// One byte an entry. The sums run modulo 256, since what comes out fits; so does the lower limb.
int64_t fill_byte_tables(const int8_t* upper, const int8_t* lower, uint8_t* tables) {
    constexpr int kTable = 16 * V::table_copies;
    const __m256i zero = _mm256_setzero_si256();
    __m256i all = zero;
    for (int g = 0; g < kPartGroups<1>; g += 8, upper += 32, lower += 32) {
        const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(upper));
        const __m256i q = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lower));
        // The upper limb is -1, 0 or 1; where it is 0, the lower one has the sign.
        const __m256i sign = _mm256_blendv_epi8(high, q, _mm256_cmpeq_epi8(high, zero));
        const __m256i is_negative = _mm256_cmpgt_epi8(zero, sign);
        const __m256i negative = _mm256_and_si256(q, is_negative);
        all = _mm256_add_epi32(all, sums_of_four(negative));
        all = _mm256_add_epi32(all, _mm256_slli_epi32(sums_of_four(_mm256_and_si256(high, is_negative)), 8));
        const __m256i pairs = _mm256_add_epi8(negative, _mm256_srli_epi32(negative, 8));
        const __m256i smallest = _mm256_add_epi8(pairs, _mm256_srli_epi32(pairs, 16));
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            const __m256i base = _mm256_shuffle_epi8(smallest, _mm256_set1_epi8(static_cast<char>(kGroup * j)));
            const __m256i table = _mm256_sub_epi8(sums_of_parts(q, kGroup * j), base);
            store_table(tables + (g + j) * kTable, _mm256_castsi256_si128(table));
            store_table(tables + (g + 4 + j) * kTable, _mm256_extracti128_si256(table, 1));
        }
    }
    return sum_to_int(all);
}

// Two bytes an entry, upper and lower in tables of their own. The sums run modulo 65536.
int64_t fill_word_tables(const int8_t* upper, const int8_t* lower, uint8_t* tables) {
    constexpr int kTable = 16 * V::table_copies;
    alignas(32) int16_t q[kTileColumns];
    alignas(32) int32_t smallest[kTileColumns / 2];
    const __m256i zero = _mm256_setzero_si256();
    for (int i = 0; i < kTileColumns; i += 16) {
        const auto words = [&](const int8_t* from) {
            return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
        };
        const __m256i word = _mm256_add_epi16(_mm256_slli_epi16(words(upper), 8), words(lower));
        _mm256_store_si256(reinterpret_cast<__m256i*>(q + i), word);
        const __m256i pairs = _mm256_madd_epi16(_mm256_min_epi16(word, zero), _mm256_set1_epi16(1));
        _mm256_store_si256(reinterpret_cast<__m256i*>(smallest + i / 2), pairs);
    }
    const __m256i index = _mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m256i has[kGroup];
    for (int c = 0; c < kGroup; ++c) {
        const __m256i bit = _mm256_set1_epi16(static_cast<int16_t>(1 << c));
        has[c] = _mm256_cmpeq_epi16(_mm256_and_si256(index, bit), bit);
    }
    int64_t all = 0;
    for (int g = 0; g < kGroups; ++g) {
        const int32_t least = smallest[2 * g] + smallest[2 * g + 1];
        all += least;
        __m256i table = _mm256_set1_epi16(static_cast<int16_t>(-least));
        for (int c = 0; c < kGroup; ++c) {
            table = _mm256_add_epi16(table, _mm256_and_si256(_mm256_set1_epi16(q[kGroup * g + c]), has[c]));
        }
        const __m256i bytes = _mm256_permute4x64_epi64(
            _mm256_packus_epi16(_mm256_srli_epi16(table, 8), _mm256_and_si256(table, _mm256_set1_epi16(255))), 0xd8);
        uint8_t* to = tables + (g / V::table_groups * 2 * V::table_groups + g % V::table_groups) * kTable;
        store_table(to, _mm256_castsi256_si128(bytes));
        store_table(to + V::table_groups * kTable, _mm256_extracti128_si256(bytes, 1));
    }
    return all;
}

void fill_tables(const InputBlock& block, int bytes, uint8_t* tables, TableBlock& description) {
    description.step = block.step;
    description.sum = int64_t{256} * block.sums[0] + block.sums[1];
    description.smallest = (bytes == 2 ? fill_word_tables : fill_byte_tables)(block.limbs[0], block.limbs[1], tables);
}

// Sums of the look-ups of one part of a plane, 16 bits a row: even bytes of the tile, odd bytes, for both nibbles.
template <int T>
struct PlaneSums {
    __m256i even[T][2], odd[T][2];
};

template <int T>
inline void sum_plane(const uint8_t* plane, const uint8_t*& ahead, const uint8_t* tables, PlaneSums<T>& sums) {
    using v = typename V::v;
    constexpr int kVectors = static_cast<int>(kPartGroups<T> * kGroupBytes / V::bytes);
    // A multiplication picks the odd bytes as a shift would, on ports that shifts and shuffles do not need.
    const v nibble = V::set1(15), odd_bytes = V::set1_16(0x100);
    v even[T][2], odd[T][2];
    for (int t = 0; t < T; ++t) even[t][0] = even[t][1] = odd[t][0] = odd[t][1] = V::zero();
#pragma GCC unroll 2
    for (int i = 0; i < kVectors; i += 2) {
        for (int line = 0; line < 2 * V::bytes; line += 64) {
            __builtin_prefetch(ahead + i * V::bytes + line);
        }
        v index[2][2];
        for (int j = 0; j < 2; ++j) {
            const v w = V::load(plane + (i + j) * V::bytes);
            index[j][0] = V::and_(w, nibble);
            index[j][1] = V::and_(V::template srl<4>(w), nibble);
        }
#pragma GCC unroll 2
        for (int t = 0; t < T; ++t) {
            const v table[2] = {V::template table<T>(tables, i, t), V::template table<T>(tables, i + 1, t)};
#pragma GCC unroll 2
            for (int h = 0; h < 2; ++h) {
                // The even bytes are what remains of the sum of 16-bit words once 256 times the odd ones is taken away.
                const v a = V::shuffle(table[0], index[0][h]), b = V::shuffle(table[1], index[1][h]);
                even[t][h] = V::add16(even[t][h], V::add16(a, b));
                odd[t][h] = V::add16(odd[t][h], V::add16(V::maddubs(a, odd_bytes), V::maddubs(b, odd_bytes)));
            }
        }
    }
    ahead += kVectors * V::bytes;
    for (int t = 0; t < T; ++t) {
        for (int h = 0; h < 2; ++h) {
            sums.odd[t][h] = V::fold(odd[t][h]);
            sums.even[t][h] = _mm256_sub_epi16(V::fold(even[t][h]), _mm256_slli_epi16(sums.odd[t][h], 8));
        }
    }
}

// What the planes count for, in units of the lowest one.
struct Powers {
    int lowest;
    int64_t all = 0, offset = 0;  // of all planes, of the inverted ones

    explicit Powers(const PlaneSet& planes) : lowest(planes.exponents[planes.count - 1]) {
        for (int p = 0; p < planes.count; ++p) {
            const int64_t power = int64_t{1} << (planes.exponents[p] - lowest);
            all += power;
            if (planes.inverted[p]) offset += power;
        }
    }
    float unit() const { return static_cast<float>(1 << lowest); }
    // From sums of table entries to sums of inputs.
    int64_t correction(const TableBlock& block) const { return all * block.smallest - offset * block.sum; }
};

// One table entry is at most 255, so planes whose exponents differ by at most so much are added up in 16 bits.
template <int T>
constexpr int kNarrowSpan = T == 1 ? 3 : 2;
static_assert(kPartGroups<1> * 255 * 15 <= 65535 && kPartGroups<2> * 255 * 7 <= 65535);

template <int T>
void look_up_bytes(const uint8_t* tiles, const PlaneSet& planes, int64_t blocks, const uint8_t* tables,
                   const TableBlock* descriptions, float* out) {
    const Powers powers(planes);
    __m256 total[8];
    for (auto& vector : total) vector = _mm256_setzero_ps();
    const __m256i zero = _mm256_setzero_si256();
    const int64_t parts = blocks * kParts<T>;
    // In the order of memory, whatever the order of parts and planes: the processor's own prefetching joins in.
    const uint8_t* ahead = tiles + kPrefetch;
    for (int64_t part = 0; part < parts; ++part, tables += kPartGroups<T> * T * 16 * V::table_copies) {
        const uint8_t* plane = tiles + part / kParts<T> * planes.count * kPlaneBytes;
        plane += part % kParts<T> * kPartGroups<T> * kGroupBytes;
        __m256i wide[T][8];
        for (auto& vectors : wide) std::fill_n(vectors, 8, zero);
        for (int p = 0, before = planes.exponents[0]; p < planes.count;) {
            const int top = planes.exponents[p];
            const bool first = p == 0;
            int last = top;
            PlaneSums<T> narrow;
            sum_plane<T>(plane, ahead, tables, narrow);
            for (++p, plane += kPlaneBytes; p < planes.count && top - planes.exponents[p] <= kNarrowSpan<T>;
                 ++p, plane += kPlaneBytes) {
                PlaneSums<T> sums;
                sum_plane<T>(plane, ahead, tables, sums);
                const __m128i shift = _mm_cvtsi32_si128(last - planes.exponents[p]);
                last = planes.exponents[p];
                for (int t = 0; t < T; ++t) {
                    for (int h = 0; h < 2; ++h) {
                        auto& even = narrow.even[t][h];
                        auto& odd = narrow.odd[t][h];
                        even = _mm256_add_epi16(_mm256_sll_epi16(even, shift), sums.even[t][h]);
                        odd = _mm256_add_epi16(_mm256_sll_epi16(odd, shift), sums.odd[t][h]);
                    }
                }
            }
            const __m128i shift = _mm_cvtsi32_si128(before - last);
            before = last;
            for (int t = 0; t < T; ++t) {
                for (int h = 0; h < 2; ++h) {
                    const __m256i low = _mm256_unpacklo_epi16(narrow.even[t][h], narrow.odd[t][h]);
                    const __m256i high = _mm256_unpackhi_epi16(narrow.even[t][h], narrow.odd[t][h]);
                    const __m256i parts[4] = {_mm256_unpacklo_epi16(low, zero), _mm256_unpackhi_epi16(low, zero),
                                              _mm256_unpacklo_epi16(high, zero), _mm256_unpackhi_epi16(high, zero)};
                    for (int i = 0; i < 4; ++i) {
                        auto& vector = wide[t][2 * i + h];
                        vector = first ? parts[i] : _mm256_add_epi32(_mm256_sll_epi32(vector, shift), parts[i]);
                    }
                }
            }
        }
        const TableBlock& d = descriptions[part];
        const int64_t correction = powers.correction(d);
        const int64_t upper = T == 2 ? correction >> 8 : correction;
        const __m256i corrections[2] = {_mm256_set1_epi32(static_cast<int32_t>(upper)),
                                        _mm256_set1_epi32(static_cast<int32_t>(correction - 256 * upper))};
        const __m256 step = _mm256_set1_ps(d.step);
        for (int i = 0; i < 8; ++i) {
            __m256 value = _mm256_cvtepi32_ps(_mm256_add_epi32(wide[0][i], corrections[0]));
            if constexpr (T == 2) {
                const __m256 lower = _mm256_cvtepi32_ps(_mm256_add_epi32(wide[1][i], corrections[1]));
                value = _mm256_fmadd_ps(value, _mm256_set1_ps(256.0f), lower);
            }
            total[i] = _mm256_fmadd_ps(value, step, total[i]);
        }
    }
    const __m256 unit = _mm256_set1_ps(powers.unit());
    for (int i = 0; i < 8; ++i) _mm256_storeu_ps(out + 8 * i, _mm256_mul_ps(total[i], unit));
}

void look_up(const uint8_t* tiles, const PlaneSet& planes, int64_t blocks, int bytes, const uint8_t* tables,
             const TableBlock* descriptions, float* out) {
    (bytes == 2 ? look_up_bytes<2> : look_up_bytes<1>)(tiles, planes, blocks, tables, descriptions, out);
}

// a where the mask is set, else b
inline __m256i select(int mask, __m256i a, __m256i b) {
    return V::select(_mm256_set1_epi8(static_cast<char>(mask)), a, b);
}

// Spread `N` planes at positions 0..N-1 over 4 vectors, one for each column: both nibbles of a byte then hold one row's
// bits, and bits of no meaning where there is no plane. Two planes at a time trade the bits of odd columns, then two
// pairs trade columns 2 and 3.
template <int N>
inline void spread(const uint8_t* const* planes, int64_t at, __m256i* columns) {
    const auto load = [&](int plane) {
        return _mm256_load_si256(reinterpret_cast<const __m256i*>(planes[plane] + at));
    };
    __m256i even[2], odd[2];
    for (int pair = 0; pair < (N + 1) / 2; ++pair) {
        const __m256i a = load(2 * pair), a_odd = _mm256_srli_epi16(a, 1);
        if (2 * pair + 1 < N) {
            const __m256i b = load(2 * pair + 1);
            even[pair] = select(0x55, a, _mm256_slli_epi16(b, 1));
            odd[pair] = select(0x55, a_odd, b);
        } else {
            even[pair] = _mm256_and_si256(a, _mm256_set1_epi8(0x55));
            odd[pair] = _mm256_and_si256(a_odd, _mm256_set1_epi8(0x55));
        }
    }
    const __m256i even2 = _mm256_srli_epi16(even[0], 2), odd2 = _mm256_srli_epi16(odd[0], 2);
    if constexpr (N > 2) {
        columns[0] = select(0x33, even[0], _mm256_slli_epi16(even[1], 2));
        columns[1] = select(0x33, odd[0], _mm256_slli_epi16(odd[1], 2));
        columns[2] = select(0x33, even2, even[1]);
        columns[3] = select(0x33, odd2, odd[1]);
    } else {
        columns[0] = even[0], columns[1] = odd[0], columns[2] = even2, columns[3] = odd2;
    }
}

template <int N>
void unpack_bits(const uint8_t* const* planes, int groups, uint8_t* panel) {
    constexpr int kLow = N < 4 ? N : 4;
    // Of 1 or 2 planes, the upper half of a nibble is another column's.
    const __m256i low_bits = _mm256_set1_epi8(N <= 2 ? 3 : 15);
    for (int g = 0; g < groups; ++g, panel += kTileRows * kGroup) {
        const int64_t at = g * kGroupBytes;
        __m256i low[4], rows[2][4];
        spread<kLow>(planes, at, low);
        if constexpr (N <= 4) {
            for (int c = 0; c < 4; ++c) {
                rows[0][c] = _mm256_and_si256(low[c], low_bits);
                rows[1][c] = _mm256_and_si256(_mm256_srli_epi16(low[c], 4), low_bits);
            }
        } else {
            __m256i high[4];
            spread<N - 4>(planes + 4, at, high);
            for (int c = 0; c < 4; ++c) {
                if constexpr (N <= 6) high[c] = _mm256_and_si256(high[c], _mm256_set1_epi8(0x33));
                rows[0][c] = select(15, low[c], _mm256_slli_epi16(high[c], 4));
                rows[1][c] = select(15, _mm256_srli_epi16(low[c], 4), high[c]);
            }
        }
        for (int h = 0; h < 2; ++h) {
            const __m256i* c = rows[h];
            const __m256i low01 = _mm256_unpacklo_epi8(c[0], c[1]), high01 = _mm256_unpackhi_epi8(c[0], c[1]);
            const __m256i low23 = _mm256_unpacklo_epi8(c[2], c[3]), high23 = _mm256_unpackhi_epi8(c[2], c[3]);
            auto* to = reinterpret_cast<__m256i*>(panel + 32 * h);
            _mm256_store_si256(to, _mm256_unpacklo_epi16(low01, low23));
            _mm256_store_si256(to + 2, _mm256_unpackhi_epi16(low01, low23));
            _mm256_store_si256(to + 4, _mm256_unpacklo_epi16(high01, high23));
            _mm256_store_si256(to + 6, _mm256_unpackhi_epi16(high01, high23));
        }
    }
}

void unpack(const uint8_t* tile, const Slice& slice, int groups, uint8_t* panel) {
    alignas(64) static const uint8_t zeros[kPlaneBytes] = {};
    const uint8_t* planes[8];
    for (int position = 0; position < slice.bits; ++position) {
        const int plane = slice.planes[position];
        planes[position] = plane < 0 ? zeros : tile + plane * kPlaneBytes;
    }
    using Unpack = void (*)(const uint8_t* const*, int, uint8_t*);
    constexpr Unpack by_bits[] = {unpack_bits<1>, unpack_bits<2>, unpack_bits<3>, unpack_bits<4>,
                                  unpack_bits<5>, unpack_bits<6>, unpack_bits<7>, unpack_bits<8>};
    by_bits[slice.bits - 1](planes, groups, panel);
}

// Call `use` with a count from 1 to M as a constant.
template <int M, class Use>
inline void with_count(int count, const Use& use) {
    if constexpr (M > 1) {
        if (count < M) return with_count<M - 1>(count, use);
    }
    use(std::integral_constant<int, M>{});
}

inline int32_t word_at(const int8_t* address) {
    int32_t word;
    std::memcpy(&word, address, sizeof word);
    return word;
}

// Into the second level: the first one is full of weights and inputs.
template <class T>
inline void prefetch_ahead(const Inputs<T>& inputs, int group, bool first) {
    if (!first || inputs.ahead == nullptr) return;
    for (int64_t at = group * inputs.ahead_bytes; at < (group + 1) * inputs.ahead_bytes; at += 64) {
        __builtin_prefetch(inputs.ahead + at, 0, 2);
    }
}

// work(std::integral_constant<int, i>) for i = 0 .. N - 1. Constant indices keep an array of vectors in registers,
// where a loop that is only unrolled may leave it in memory.
template <int... I, class Work>
[[gnu::always_inline]] inline void each_of(std::integer_sequence<int, I...>, const Work& work) {
    (work(std::integral_constant<int, I>{}), ...);
}
template <int N, class Work>
[[gnu::always_inline]] inline void each(const Work& work) {
    each_of(std::make_integer_sequence<int, N>{}, work);
}
#define CSQ_INLINE __attribute__((always_inline))

// A block of R vectors of rows and M batch rows. S products of bytes are added up in 16 bits before they are widened;
// 0: each is widened at once.
template <int R, int M, int S>
void multiply_block(const uint8_t* panel, int groups, const Inputs<int8_t>& inputs, int64_t m0, int row,
                    const Sums& to) {
    using v = typename V::v;
    constexpr int kLanes = V::bytes / 4;
    v sums[M * R];
    const int8_t* bases[M];
    for (int m = 0; m < M; ++m) bases[m] = inputs.bases[m0 + m];
    const auto place = [&](int i) CSQ_INLINE { return (m0 + i / R) * kTileRows + row + i % R * kLanes; };
    if (to.totals != nullptr) {
        each<M * R>([&](auto i) CSQ_INLINE { sums[i] = V::load_32(to.totals + place(i)); });
    } else {
        each<M * R>([&](auto i) CSQ_INLINE { sums[i] = V::set1_32(to.starts[m0 + i / R]); });
    }
    // Calls add(sum, weights, inputs) for each sum.
    const auto multiply_group = [&](int g, const auto& add) CSQ_INLINE {
        prefetch_ahead(inputs, g, m0 == 0 && row == 0);
        v w[R];
        each<R>([&](auto r) CSQ_INLINE { w[r] = V::load(panel + g * kTileRows * kGroup + r * V::bytes); });
        const int32_t offset = inputs.offsets[g];
        each<M>([&](auto m) CSQ_INLINE {
            const v x = V::set1_32(word_at(bases[m] + offset));
            each<R>([&](auto r) CSQ_INLINE { add(std::integral_constant<int, m() * R + r()>{}, w[r], x); });
        });
    };
    if constexpr (S == 0) {
        for (int g = 0; g < groups; ++g) {
            multiply_group(g, [&](auto i, v w, v x) CSQ_INLINE { sums[i] = V::dot(sums[i], w, x); });
        }
    } else {
        const v ones = V::set1_16(1);
        for (int g0 = 0; g0 < groups; g0 += S) {
            const int end = std::min(groups, g0 + S);
            v narrow_sums[M * R];
            each<M * R>([&](auto i) CSQ_INLINE { narrow_sums[i] = V::zero(); });
            for (int g = g0; g < end; ++g) {
                multiply_group(g, [&](auto i, v w, v x)
                                      CSQ_INLINE { narrow_sums[i] = V::add16(narrow_sums[i], V::maddubs(w, x)); });
            }
            each<M * R>([&](auto i) CSQ_INLINE { sums[i] = V::add32(sums[i], V::madd(narrow_sums[i], ones)); });
        }
    }
    if (to.totals != nullptr) {
        each<M * R>([&](auto i) CSQ_INLINE { V::store_32(to.totals + place(i), sums[i]); });
    } else {
        each<M * R>([&](auto i) CSQ_INLINE { V::add_scaled(to.out + place(i), to.factors[m0 + i / R], sums[i]); });
    }
}

// Run `block(m0, std::integral_constant<int, count>)` over the batch in blocks of at most M rows, of even sizes.
template <int M, class Block>
inline void split_batch(int64_t batch, const Block& block) {
    const int64_t blocks = (batch + M - 1) / M;
    for (int64_t i = 0; i < blocks; ++i) {
        const int64_t m0 = batch * i / blocks;
        const int count = static_cast<int>(batch * (i + 1) / blocks - m0);
        with_count<M>(count, [&](auto constant) { block(m0, constant); });
    }
}

template <int R, int M, int S>
void multiply_rows(const uint8_t* panel, int groups, int64_t batch, const Inputs<int8_t>& inputs, int row,
                   const Sums& to) {
    split_batch<M>(batch, [&](int64_t m0, auto count) {
        multiply_block<R, count(), S>(panel + row * kGroup, groups, inputs, m0, row, to);
    });
}

template <int S>
void multiply_bits(const uint8_t* panel, int groups, int row_vectors, int64_t batch, const Inputs<int8_t>& inputs,
                   const Sums& to) {
    constexpr int kLanes = V::bytes / 4;
    const int rows = 16 * row_vectors;
    int row = 0;
    for (; row + V::rows * kLanes <= rows; row += V::rows * kLanes) {
        multiply_rows<V::rows, V::batch, S>(panel, groups, batch, inputs, row, to);
    }
    for (; row < rows; row += kLanes) multiply_rows<1, V::tall_batch, S>(panel, groups, batch, inputs, row, to);
}

// Products of bytes that fit 16 bits together, two of them added by each instruction, for weights of so many bits.
constexpr int products_in_16_bits(int bits) { return 32767 / (2 * 128 * ((1 << bits) - 1)); }
static_assert(products_in_16_bits(7) == 1 && products_in_16_bits(8) == 0, "without VNNI a slice has at most 7 bits");

using Multiply = void (*)(const uint8_t*, int, int, int64_t, const Inputs<int8_t>&, const Sums&);

template <int SliceBits>
constexpr Multiply multiply_of(int bits) {
    static_assert(products_in_16_bits(4) >= 8 && products_in_16_bits(5) >= 4 && products_in_16_bits(6) >= 2);
    if constexpr (SliceBits < 8) {
        if (bits <= 4) return multiply_bits<8>;
        if (bits == 5) return multiply_bits<4>;
        if (bits == 6) return multiply_bits<2>;
    }
    return multiply_bits<0>;
}

void multiply(const uint8_t* panel, int bits, int groups, int row_vectors, int64_t batch, const Inputs<int8_t>& inputs,
              const Sums& sums) {
    multiply_of<V::slice_bits>(bits)(panel, groups, row_vectors, batch, inputs, sums);
}

void convert(const uint8_t* panel, const Slice& slice, bool add, int groups, float* floats) {
    const __m256 unit = _mm256_set1_ps(static_cast<float>(1 << slice.lowest));
    const __m256i offset = _mm256_set1_epi32(slice.offset), byte = _mm256_set1_epi32(255);
    for (int g = 0; g < groups; ++g) {
        for (int r = 0; r < kTileRows; r += 8, panel += 32) {
            __m256i rows = _mm256_load_si256(reinterpret_cast<const __m256i*>(panel));
            for (int c = 0; c < kGroup; ++c, rows = _mm256_srli_epi32(rows, 8)) {
                float* to = floats + (g * kGroup + c) * kTileRows + r;
                const __m256i code = _mm256_sub_epi32(_mm256_and_si256(rows, byte), offset);
                const __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(code), unit);
                _mm256_store_ps(to, add ? _mm256_add_ps(value, _mm256_load_ps(to)) : value);
            }
        }
    }
}

// Few batch rows: the bytes become floats on their way to the product. P partial sums, for columns modulo P, keep the
// rounding errors of a long sum down where so few others could hide them.
template <int R, int M, int P, bool Signed>
void multiply_codes_block(const uint8_t* panel, int offset, float unit, int groups, int row_vectors,
                          const Inputs<float>& inputs, float* out) {
    using v = typename V::v;
    using f = typename V::f;
    constexpr int kLanes = V::bytes / 4;
    const v offsets = V::set1(offset);
    for (int row = 0; row < 16 * row_vectors; row += R * kLanes) {
        f sums[P][M][R];
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
#pragma GCC unroll 12
            for (int m = 0; m < M; ++m) {
#pragma GCC unroll 12
                for (int r = 0; r < R; ++r) sums[p][m][r] = V::zero_f();
            }
        }
        for (int g = 0; g < groups; ++g) {
            prefetch_ahead(inputs, g, row == 0);
            v codes[R];
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r) {
                codes[r] = V::sub8(V::load(panel + (g * kTileRows + row + r * kLanes) * kGroup), offsets);
            }
            const auto column = [&](auto c) {
#pragma GCC unroll 12
                for (int r = 0; r < R; ++r) {
                    const f weights = V::template column_to_float<c(), Signed>(codes[r]);
#pragma GCC unroll 12
                    for (int m = 0; m < M; ++m) {
                        const f x = V::set1_f(inputs.bases[m][inputs.offsets[g] + c()]);
                        sums[c() % P][m][r] = V::fma(weights, x, sums[c() % P][m][r]);
                    }
                }
            };
            column(std::integral_constant<int, 0>{});
            column(std::integral_constant<int, 1>{});
            column(std::integral_constant<int, 2>{});
            column(std::integral_constant<int, 3>{});
        }
#pragma GCC unroll 12
        for (int m = 0; m < M; ++m) {
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r) {
                f sum = V::add_f(sums[0][m][r], sums[1][m][r]);
                if constexpr (P == 4) sum = V::add_f(sum, V::add_f(sums[2][m][r], sums[3][m][r]));
                float* to = out + m * kTileRows + row + r * kLanes;
                V::store_f(to, V::fma(sum, V::set1_f(unit), V::load_f(to)));
            }
        }
    }
}

template <int M>
void multiply_codes_rows(const uint8_t* panel, const Slice& slice, int groups, int row_vectors,
                         const Inputs<float>& inputs, float* out) {
    constexpr int R = 64 / V::bytes;  // 16 rows
    constexpr int P = V::bytes == 64 || M == 1 ? 4 : 2;
    const float unit = static_cast<float>(1 << slice.lowest);
    (slice.offset > 0
         ? multiply_codes_block<R, M, P, true>
         : multiply_codes_block<R, M, P, false>)(panel, slice.offset, unit, groups, row_vectors, inputs, out);
}

void multiply_codes(const uint8_t* panel, const Slice& slice, int groups, int row_vectors, int64_t batch,
                    const Inputs<float>& inputs, float* out) {
    (batch == 1 ? multiply_codes_rows<1> : multiply_codes_rows<2>)(panel, slice, groups, row_vectors, inputs, out);
}

// As many partial sums, for columns modulo P, as the registers hold.
template <int R, int M>
void multiply_float_block(const float* floats, int groups, const Inputs<float>& inputs, int64_t m0, float* out) {
    using f = typename V::f;
    constexpr int kLanes = V::bytes / 4;
    constexpr int P = 2 * R * M <= V::rows * V::float_batch ? 2 : 1;
    f sums[P][M][R];
    const float* bases[M];
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
        bases[m] = inputs.bases[m0 + m];
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) {
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r) sums[p][m][r] = V::zero_f();
        }
    }
    for (int g = 0; g < groups; ++g) {
        const int32_t offset = inputs.offsets[g];
#pragma GCC unroll 4
        for (int c = 0; c < kGroup; ++c) {
            f w[R];
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r) w[r] = V::load_f(floats + (g * kGroup + c) * kTileRows + r * kLanes);
#pragma GCC unroll 12
            for (int m = 0; m < M; ++m) {
                const f x = V::set1_f(bases[m][offset + c]);
#pragma GCC unroll 12
                for (int r = 0; r < R; ++r) sums[c % P][m][r] = V::fma(w[r], x, sums[c % P][m][r]);
            }
        }
    }
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
            float* to = out + (m0 + m) * kTileRows + r * kLanes;
            if constexpr (P == 2) sums[0][m][r] = V::add_f(sums[0][m][r], sums[1][m][r]);
            V::store_f(to, V::add_f(V::load_f(to), sums[0][m][r]));
        }
    }
}

template <int R, int M>
void multiply_float_rows(const float* floats, int groups, int64_t batch, const Inputs<float>& inputs, float* out) {
    split_batch<M>(batch,
                   [&](int64_t m0, auto count) { multiply_float_block<R, count()>(floats, groups, inputs, m0, out); });
}

void multiply_floats(const float* floats, int groups, int row_vectors, int64_t batch, const Inputs<float>& inputs,
                     float* out) {
    constexpr int kLanes = V::bytes / 4;
    int vector = 0;
    const int vectors = row_vectors * (64 / V::bytes);
    for (; vector + V::rows <= vectors; vector += V::rows) {
        multiply_float_rows<V::rows, V::float_batch>(floats + vector * kLanes, groups, batch, inputs,
                                                     out + vector * kLanes);
    }
    for (; vector < vectors; ++vector) {
        multiply_float_rows<1, V::tall_batch>(floats + vector * kLanes, groups, batch, inputs, out + vector * kLanes);
    }
}

float largest(const float* x, int64_t count) {
    __m256 most = _mm256_setzero_ps(), not_finite = most;
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        const __m256 v = _mm256_loadu_ps(x + i);
        not_finite = _mm256_add_ps(not_finite, _mm256_mul_ps(v, _mm256_setzero_ps()));
        most = _mm256_max_ps(most, magnitude(v));
    }
    float result = max_to_float(most), wrong = sum_to_float(not_finite);
    for (; i < count; ++i) {
        result = std::max(result, std::fabs(x[i]));
        wrong += x[i] * 0.0f;
    }
    return wrong != 0.0f ? std::numeric_limits<float>::quiet_NaN() : result;
}

inline __m256i pack_channels(const __m256i* q) {
    const __m256i byte = _mm256_set1_epi32(255);
    const __m256i low =
        _mm256_or_si256(_mm256_and_si256(q[0], byte), _mm256_slli_epi32(_mm256_and_si256(q[1], byte), 8));
    const __m256i high =
        _mm256_or_si256(_mm256_slli_epi32(_mm256_and_si256(q[2], byte), 16), _mm256_slli_epi32(q[3], 24));
    return _mm256_or_si256(low, high);
}

// The last, incomplete vector is read and written through memory of its own.
void gather_bytes(const float* from, int64_t stride, int channels, int64_t count, float inverse_step,
                  int8_t* const* limbs) {
    const bool two = limbs[1] != nullptr;
    const __m256 inverse = _mm256_set1_ps(inverse_step);
    for (int64_t i = 0; i < count; i += 8) {
        const int64_t n = std::min<int64_t>(8, count - i);
        __m256i high[4], low[4];
        for (int c = 0; c < 4; ++c) {
            __m256 x = _mm256_setzero_ps();
            if (c < channels && n == 8) {
                x = _mm256_loadu_ps(from + c * stride + i);
            } else if (c < channels) {
                alignas(32) float part[8] = {};
                std::copy_n(from + c * stride + i, n, part);
                x = _mm256_load_ps(part);
            }
            const __m256i q = _mm256_cvtps_epi32(_mm256_mul_ps(x, inverse));
            high[c] = two ? upper_byte(q) : q;
            low[c] = lower_byte(q, high[c]);
        }
        const auto emit = [&](int8_t* to, __m256i bytes) {
            if (n == 8) {
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 4 * i), bytes);
            } else {
                alignas(32) int8_t part[32];
                _mm256_store_si256(reinterpret_cast<__m256i*>(part), bytes);
                std::memcpy(to + 4 * i, part, 4 * n);
            }
        };
        emit(limbs[0], pack_channels(high));
        if (two) emit(limbs[1], pack_channels(low));
    }
}

void gather_floats(const float* from, int64_t stride, int channels, int64_t count, float* to) {
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
        __m128 rows[4];
        for (int c = 0; c < 4; ++c) rows[c] = c < channels ? _mm_loadu_ps(from + c * stride + i) : _mm_setzero_ps();
        _MM_TRANSPOSE4_PS(rows[0], rows[1], rows[2], rows[3]);
        for (int j = 0; j < 4; ++j) _mm_storeu_ps(to + 4 * (i + j), rows[j]);
    }
    for (; i < count; ++i) {
        for (int c = 0; c < 4; ++c) to[4 * i + c] = c < channels ? from[c * stride + i] : 0.0f;
    }
}

void add_channels(const int8_t* from, int64_t count, int32_t* sums) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + kGroup * i));
        auto* to = reinterpret_cast<__m256i*>(sums + i);
        _mm256_storeu_si256(to, _mm256_add_epi32(_mm256_loadu_si256(to), sums_of_four(bytes)));
    }
    for (; i < count; ++i) {
        for (int c = 0; c < kGroup; ++c) sums[i] += from[kGroup * i + c];
    }
}

void store_transposed(const float* from, int rows, int64_t count, const float* steps, const float* bias, float* to,
                      int64_t to_stride) {
    int64_t m = 0;
    for (; m + 4 <= count; m += 4) {
        for (int r = 0; r < rows; r += 4) {
            __m128 block[4];
            for (int j = 0; j < 4; ++j) block[j] = _mm_loadu_ps(from + (m + j) * kTileRows + r);
            _MM_TRANSPOSE4_PS(block[0], block[1], block[2], block[3]);
            const int n = std::min(4, rows - r);
            for (int j = 0; j < n; ++j) {
                const __m128 value = _mm_fmadd_ps(block[j], _mm_set1_ps(steps[r + j]), _mm_set1_ps(bias[r + j]));
                _mm_storeu_ps(to + (r + j) * to_stride + m, value);
            }
        }
    }
    for (; m < count; ++m) {
        for (int r = 0; r < rows; ++r) to[r * to_stride + m] = std::fma(from[m * kTileRows + r], steps[r], bias[r]);
    }
}

constexpr BitserialKernels kBitserial = {
    V::slice_bits,   V::table_copies, quantize, fill_tables,  look_up,       unpack,       multiply,         convert,
    multiply_floats, multiply_codes,  largest,  gather_bytes, gather_floats, add_channels, store_transposed,
};
