# Options of the build and the flags that every target shares.
option(PDXFER_PYTHON "Build the Python module" ON)
option(PDXFER_TESTS "Build the C++ tests" OFF)
option(PDXFER_FUZZ "Build the fuzz targets under tests/fuzz (clang only)" OFF)
option(PDXFER_WERROR "Treat warnings as errors" OFF)
set(PDXFER_SANITIZE "" CACHE STRING "Sanitizers for -fsanitize=, such as address,undefined or thread")
set(PDXFER_VERSION "${SKBUILD_PROJECT_VERSION}" CACHE STRING "Version compiled into the module")
if(NOT PDXFER_VERSION)
  set(PDXFER_VERSION "0.0.0+dev")
endif()

if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release)
endif()
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(THREADS_PREFER_PTHREAD_FLAG ON)
find_package(Threads REQUIRED)

# No -march: one wheel runs on every machine of its architecture; wider instructions are chosen at run time.
add_library(pdxfer_options INTERFACE)
target_compile_features(pdxfer_options INTERFACE cxx_std_20)
target_compile_options(pdxfer_options INTERFACE -Wall -Wextra -Wpedantic -fvisibility=hidden -fvisibility-inlines-hidden
  -ffunction-sections -fdata-sections $<$<BOOL:${PDXFER_WERROR}>:-Werror>
  # GCC 12 at -O3 sees what cannot happen in std::vector::insert and in "text" + std::string (GCC bug 105651).
  $<$<CXX_COMPILER_ID:GNU>:-Wno-stringop-overflow -Wno-restrict>)
target_link_options(pdxfer_options INTERFACE -Wl,--as-needed -Wl,--gc-sections)
if(PDXFER_SANITIZE)
  target_compile_options(pdxfer_options INTERFACE -fsanitize=${PDXFER_SANITIZE} -fno-omit-frame-pointer
    -fno-sanitize-recover=all)
  if(PDXFER_SANITIZE MATCHES undefined)
    # Its vptr check opens a pipe to probe memory, and fails where a test has used up every file descriptor.
    target_compile_options(pdxfer_options INTERFACE -fno-sanitize=vptr)
  endif()
  target_link_options(pdxfer_options INTERFACE -fsanitize=${PDXFER_SANITIZE})
endif()
if(PDXFER_FUZZ)
  if(NOT CMAKE_CXX_COMPILER_ID STREQUAL "Clang")
    message(FATAL_ERROR "PDXFER_FUZZ needs clang (libFuzzer), not ${CMAKE_CXX_COMPILER_ID}: "
      "configure with -DCMAKE_CXX_COMPILER=clang++")
  endif()
  target_compile_options(pdxfer_options INTERFACE -fsanitize=fuzzer-no-link,address,undefined -fno-omit-frame-pointer
    -fno-sanitize-recover=all)
  target_link_options(pdxfer_options INTERFACE -fsanitize=address,undefined)
endif()

# The Python module carries its own C++ runtime and exports nothing but its entry point: it loads beside any libstdc++
# that another package brought, and on distributions older than the one it was built on.
add_library(pdxfer_module_link INTERFACE)
if(NOT PDXFER_SANITIZE)
  target_link_options(pdxfer_module_link INTERFACE -static-libstdc++ -static-libgcc
    -Wl,--version-script=${PROJECT_SOURCE_DIR}/cmake/module.map -Wl,-z,relro -Wl,-z,now $<$<CONFIG:Release>:-Wl,-s>)
endif()
