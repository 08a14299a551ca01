# Device code: compile csrc/pack/paged_copy.cu and embed it, when a CUDA compiler is at hand.
#
# cmake/device_code.py does the work (it also runs alone, as CI does). No compiler is no error: the module is built
# without device code and says so, with the reason, here and in `pdxfer doctor`.
set(PDXFER_DEVICE_CODE "auto" CACHE STRING "auto: build device code when a CUDA compiler is found; required; off")
set(PDXFER_CUDA_COMPILER "" CACHE STRING "nvcc or libnvrtc.so to use, in place of searching")
set_property(CACHE PDXFER_DEVICE_CODE PROPERTY STRINGS auto required off)

set(PDXFER_DEVICE_SCRIPT ${PROJECT_SOURCE_DIR}/cmake/device_code.py)
set(PDXFER_DEVICE_INC ${PROJECT_BINARY_DIR}/device_code.inc)
set(PDXFER_DEVICE_FLAGS --mode ${PDXFER_DEVICE_CODE})
if(PDXFER_CUDA_COMPILER)
  list(APPEND PDXFER_DEVICE_FLAGS --compiler ${PDXFER_CUDA_COMPILER})
endif()

execute_process(COMMAND ${Python_EXECUTABLE} ${PDXFER_DEVICE_SCRIPT} find ${PDXFER_DEVICE_FLAGS}
  OUTPUT_VARIABLE PDXFER_DEVICE_REPORT ERROR_VARIABLE PDXFER_DEVICE_ERROR RESULT_VARIABLE PDXFER_DEVICE_RESULT
  OUTPUT_STRIP_TRAILING_WHITESPACE)
if(NOT PDXFER_DEVICE_RESULT EQUAL 0)
  message(FATAL_ERROR "${PDXFER_DEVICE_ERROR}")
endif()
message(STATUS "${PDXFER_DEVICE_REPORT}")

add_custom_command(OUTPUT ${PDXFER_DEVICE_INC}
  COMMAND ${Python_EXECUTABLE} ${PDXFER_DEVICE_SCRIPT} build ${PDXFER_DEVICE_FLAGS}
    --source ${PROJECT_SOURCE_DIR}/csrc/pack/paged_copy.cu --include ${PROJECT_SOURCE_DIR}/csrc --out ${PDXFER_DEVICE_INC}
  DEPENDS ${PDXFER_DEVICE_SCRIPT} ${PROJECT_SOURCE_DIR}/csrc/pack/paged_copy.cu
    ${PROJECT_SOURCE_DIR}/csrc/pack/paged_copy_args.hpp
  COMMENT "Device code" VERBATIM)
add_custom_target(pdxfer_device_code DEPENDS ${PDXFER_DEVICE_INC})
add_dependencies(pdxfer_native pdxfer_device_code)
set_source_files_properties(${PROJECT_SOURCE_DIR}/csrc/pack/device_code.cpp PROPERTIES
  COMPILE_DEFINITIONS "PDXFER_DEVICE_INC=\"${PDXFER_DEVICE_INC}\"" OBJECT_DEPENDS ${PDXFER_DEVICE_INC})
